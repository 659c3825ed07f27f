"""SIGTERM from a cluster scheduler: recorded, agreed on by all ranks, and left to the caller to handle."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightrft.config import StrategyError
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.telemetry.log import logger


class StopRequest:
    """Whether some rank was asked to stop, while `watching`."""

    def __init__(self, consensus: RankConsensus) -> None:
        self._consensus = consensus
        self.is_watching = self._signalled = False
        self.agreed = False
        """Whether all ranks know that one was asked to stop; the same on every rank."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record a SIGTERM that arrives in the body. Every rank enters it, in its main thread."""
        if threading.current_thread() is not threading.main_thread():
            raise StrategyError(
                "saving_on_sigterm: expected the main thread, which alone receives signals, got thread "
                f"{threading.current_thread().name!r}. Enter the block in the main thread"
            )
        if self.is_watching:
            raise StrategyError(
                "saving_on_sigterm: expected one block at a time, got one inside another. Use one block around the loop"
            )
        self.is_watching, self._signalled, self.agreed = True, False, False
        previous = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.is_watching = False

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def agree(self) -> None:
        """Find out whether some rank was asked to stop. Every rank that is watching calls this after the same update."""
        if not self.agreed:
            self.agreed = any(self._consensus.exchange("optimizer_step: SIGTERM", self._signalled))
            if self.agreed:
                logger.warning("SIGTERM: stop requested; leave the training loop, and the checkpoint will be saved")
