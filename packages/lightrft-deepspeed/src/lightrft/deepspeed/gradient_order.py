"""Detecting that ranks used different modules, before ZeRO-2 adds gradients of different parameters.

ZeRO-2 flattens gradients in the order in which they arrive, and adds up what the ranks have at the same position:
https://github.com/deepspeedai/DeepSpeed/issues/2343. If one rank lacks a parameter, gloo aborts the process because of
the wrong length; if two ranks used different modules of equal size, there is no error. ZeRO-3 waits until the timeout.
ZeRO-0 and 1 can reduce the same parameters on all ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import StrategyError
from lightrft.strategy.backend import World


class GradientOrder:
    """Which parameters of one model got a gradient in the current backward pass, in order."""

    def __init__(self, parameters: Sequence[nn.Parameter], world: World) -> None:
        self._world = world
        self._arrived: list[int] = []
        self._handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._arrived.append(index))
            for index, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]

    def check(self) -> None:
        """Compare the ranks, and reset. All ranks must call this.

        Raises:
            StrategyError: On every rank, if the ranks differ.
        """
        digest, self._arrived = hash(tuple(self._arrived)), []
        bounds = torch.tensor([digest, -digest - 1])  # -digest - 1: no overflow at the least int64
        dist.all_reduce(bounds, op=dist.ReduceOp.MIN, group=self._world.cpu_group)
        if bounds.tolist() != [digest, -digest - 1]:
            raise StrategyError(
                "backward: expected all ranks to use the same modules of this model in the same order, got differences, with "
                "which DeepSpeed would add gradients of different parameters. Use the same modules on every rank (add 0 times "
                "the output of those that a rank has no data for), or zero_stage 0 or 1"
            )

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
