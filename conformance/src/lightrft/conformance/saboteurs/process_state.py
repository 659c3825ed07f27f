"""Defects of the process around a strategy: random streams, signals, threads, closing, printing and logging."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import ReplicatedBackend, World
from lightrft.strategy.telemetry.log import logger

# mypy: disable-error-code="misc, union-attr, arg-type"


@saboteur("LIFE-1")
class SeedsAgain(FakeStrategy):
    """Each call of setup_distributed sets the seed."""

    def setup_distributed(self, timeout: timedelta | None = None) -> None:
        again = self._open
        super().setup_distributed(timeout)
        if again:
            self.set_seed(self.config.seed)


@saboteur("LIFE-5")
class OpenAfterAnError(FakeStrategy):
    """The strategy is not closed if an exception leaves the with block."""

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.close()


@saboteur("LIFE-9")
class GatheringDraws(FakeStrategy):
    """all_gather draws from NumPy's random stream."""

    def all_gather(self, data: Any) -> Any:
        np.random.rand()
        return super().all_gather(data)


@saboteur("LOG-1", world=2)
class ErrorsOfAllRanks(ReplicatedBackend):
    """The logger logs errors on every rank."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._filters = list(logger.filters)
        logger.filters[:] = [lambda record: self.world.rank == 0 or record.levelno >= logging.ERROR]

    @override
    def close(self) -> None:
        logger.filters[:] = self._filters


@saboteur("LOG-1", world=2)
class PrintsBesides(PlainStrategy):
    """On ranks other than 0, print prints to standard error."""

    def print(self, *message: object) -> None:
        if not self.is_rank_0():
            print(*message, file=sys.stderr)
        super().print(*message)


@saboteur("LIFE-10")
class ForgetsTheHandler(FakeStrategy):
    """After saving_on_sigterm, SIGTERM has its default effect, whatever the script had set."""

    @contextmanager
    def saving_on_sigterm(self, save: Callable[[], object]) -> Iterator[None]:
        with super().saving_on_sigterm(save):
            yield
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@saboteur("LIFE-9")
class HandlesSignals(FakeStrategy):
    """A strategy handles SIGTERM from its creation on."""

    def _begin(self) -> None:
        super()._begin()
        signal.signal(signal.SIGTERM, lambda number, frame: None)


@saboteur("LIFE-9")
class OneThread(FakeStrategy):
    """A strategy sets the number of torch's threads when it is created."""

    def _begin(self) -> None:
        super()._begin()
        torch.set_num_threads(torch.get_num_threads() + 1)
