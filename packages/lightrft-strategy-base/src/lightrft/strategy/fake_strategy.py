"""`FakeStrategy`: the full contract in one process, without a process group or a GPU.

Not a mock: it trains, clips, accumulates, skips and generates. The other strategies must match it. Use it to test
scripts without a cluster.
"""

from typing_extensions import override

from lightrft.config import ArgumentTypeError, ConfigError, StrategyConfig
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.replicated import ReplicatedBackend
from lightrft.strategy.distributed.world import World, launch
from lightrft.strategy.strategy_base import StrategyBase


class FakeBackend(ReplicatedBackend):
    """One process. Also trains models and optimizers that were not passed to `prepare`."""

    capabilities = frozenset({"unprepared_models", "rank_dependent_modules"})
    accepts_unprepared = True

    @classmethod
    @override
    def join(cls, config: StrategyConfig) -> World:
        processes, launcher, variable = launch()
        if processes != 1:
            source = f"{launcher}, {variable}" if variable else launcher
            raise ConfigError(
                f"get_strategy: expected one process for strategy 'fake', got {processes} ({source}). Each would train by "
                f"itself and overwrite the others' checkpoints. Start one process, without {launcher}, or use another "
                f"strategy"
            )
        return World.alone(config)


class StrictFakeBackend(FakeBackend):
    """One process. Refuses models that were not prepared, as the other strategies do."""

    capabilities = frozenset({"rank_dependent_modules"})
    accepts_unprepared = False


class FakeStrategy(StrategyBase):
    """Trains in one process with plain PyTorch, without a process group or a GPU.

    It implements the full contract, and all other strategies must match its results. Models and optimizers may be used
    without `prepare`.
    """

    name = "fake"
    backend_class = FakeBackend

    def __init__(self, config: object = None, *, args: object = None, strict: bool = False, **settings: object) -> None:
        """Create the backend.

        Args:
            config: As for every strategy.
            args: As for every strategy.
            strict: Refuse models and optimizers that were not prepared, as the other strategies do, instead of a warning.
                For tests of scripts.
            **settings: As for every strategy.

        Raises:
            ConfigError: A setting is invalid, or this process is one of several.
        """
        if not isinstance(strict, bool):
            raise ArgumentTypeError(
                f"FakeStrategy: expected strict to be True or False, got {strict!r} ({type(strict).__name__})"
            )
        self._strict = strict
        super().__init__(config, args=args, **settings)

    @override
    def make_backend(self, config: StrategyConfig, world: World) -> Backend:
        return StrictFakeBackend(config, world) if self._strict else super().make_backend(config, world)


def get_fake_strategy(args: object = None, *, strict: bool = False, **settings: object) -> FakeStrategy:
    """Return a `FakeStrategy` with the settings of ``args``, or with the defaults.

    Args:
        args: As for `get_strategy`.
        strict: As for `FakeStrategy`.
        **settings: Individual settings that override those of ``args``.
    """
    return FakeStrategy(args, strict=strict, **settings)
