"""Finding out that ranks used different modules, before their gradients are mixed up.

ZeRO-2 flattens gradients in the order in which they come, and adds up what the ranks have at the same place.
Where one rank lacks a parameter, gloo ends the process for a wrong length; where two ranks used different
modules of one size, the sum is of different parameters, and nobody notices. (ZeRO-3 waits in vain when it
gathers parameters, and ZeRO-0 and 1 can be made to reduce the same on all ranks.)
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import StrategyError
from lightrft.strategy.distributed.world import World


class GradientOrder:
    """Which parameters of one model got a gradient in the backward under way, in order."""

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        self._world = world
        self._arrived: list[int] = []
        self._handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._arrived.append(index))
            for index, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]

    def check(self) -> None:
        """Raise `StrategyError` on every rank unless all ranks saw the same, and begin anew. Every rank calls this."""
        own, self._arrived = hash(tuple(self._arrived)), []
        least_and_most = torch.tensor([own, -own - 1])  # -own - 1: no overflow at the least int64
        dist.all_reduce(least_and_most, op=dist.ReduceOp.MIN, group=self._world.control)
        if least_and_most.tolist() != [own, -own - 1]:
            raise StrategyError(
                "backward: the ranks used different modules of this model, or used them in another order; DeepSpeed would mix "
                "up their gradients. Use the same on every rank (add 0 times the output of those that a rank has no data "
                "for), or zero_stage 0 or 1"
            )

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
