"""Data-parallel training in the plainest way: every rank has the whole model, and gradients are averaged by hand.

A right strategy, to which saboteurs add a defect where they need more than one rank.
"""

import torch.distributed as dist
from torch import nn
from typing_extensions import override

from lightrft.strategy import StrategyBase
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.training.gradients import fill_missing
from lightrft.strategy.training.modules import replicate
from lightrft.strategy.training.trained_model import TrainedModel


class PlainStrategy(StrategyBase):
    """Whole models, and one all-reduce for each gradient of an update."""

    name = "plain"
    capabilities = frozenset({"uneven_modules"})

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        replicate(module, self.world)
        return module

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        self.average(trained)
        return super()._update(trained, factor)

    def average(self, trained: TrainedModel) -> None:
        """The mean of the gradients over the ranks, on every rank."""
        fill_missing(trained.parameters)
        for parameter in trained.parameters:
            if parameter.grad is not None:  # it is None where a parameter was frozen meanwhile
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.size
