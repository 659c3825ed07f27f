"""`FakeStrategy`: the whole contract in one process, with no process group and no GPU.

Not a mock: it trains, clips, accumulates, skips and generates. The other strategies must match it. Use it to test
scripts without a cluster.
"""

from typing import Any

from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.strategy.backend.replicated import ReplicatedBackend
from lightrft.strategy.distributed.world import World
from lightrft.strategy.strategy_base import StrategyBase


class FakeBackend(ReplicatedBackend):
    """One process. Trains bare models and optimizers too, without `prepare`."""

    capabilities = frozenset({"adoption", "uneven_modules"})
    accepts_unprepared = True

    @classmethod
    @override
    def join(cls, config: StrategyConfig) -> World:
        return World.alone(config)


class FakeStrategy(StrategyBase):
    """One process, plain torch."""

    name = "fake"
    backend_class = FakeBackend


def get_fake_strategy(args: object = None, **settings: Any) -> FakeStrategy:
    """Return a `FakeStrategy` with the settings of ``args``, or with the defaults.

    Args:
        args: As for `get_strategy`.
        **settings: Single settings that replace those of ``args``.
    """
    return FakeStrategy(args, **settings)
