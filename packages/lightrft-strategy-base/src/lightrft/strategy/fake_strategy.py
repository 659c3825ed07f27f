"""`FakeStrategy`: the whole contract in one process, with no process group and no GPU.

No mock: it trains, clips, accumulates, skips and generates for real. It is what the other strategies must
equal, and what a script is tested with where there is no cluster.
"""

from typing import Any

from torch import nn
from typing_extensions import override

from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.distributed.world import World
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.strategy.training.modules import replicate


class FakeStrategy(StrategyBase):
    """One process, plain torch. Takes bare models and optimizers too, without `prepare`."""

    name = "fake"
    adopts = True
    capabilities = frozenset({"adoption", "uneven_modules"})

    @override
    def _join(self) -> World:
        return World.alone(self.config)

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        replicate(module, self.world)
        return module


def get_fake_strategy(args: object = None, **settings: Any) -> FakeStrategy:
    """A `FakeStrategy` with the settings of ``args``, or with the defaults."""
    return FakeStrategy(args, **settings)
