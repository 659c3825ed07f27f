"""SIGTERM as a scheduler's warning: save at the next update boundary, and end cleanly."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lightrft.config import StrategyError
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.log import logger


class Termination:
    """What to do about SIGTERM, while `watching`."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._save: Callable[[], object] | None = None
        self._asked = False

    @contextmanager
    def watching(self, save: Callable[[], object]) -> Iterator[None]:
        """SIGTERM in the body is remembered. Every rank enters it."""
        if threading.current_thread() is not threading.main_thread():
            raise StrategyError("saving_on_sigterm: signals reach the main thread alone; enter it there")
        if self._save is not None:
            raise StrategyError("saving_on_sigterm: it is in force already")
        self._save, self._asked = save, False
        before = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            self._save = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def due(self) -> Callable[[], object] | None:
        """What to call now, where some rank was asked to end. Every rank calls this, at the same update boundary."""
        if self._save is None or not any(self._collectives.exchange("optimizer_step: SIGTERM", self._asked)):
            return None
        logger.warning("SIGTERM: saving, and ending")
        return self._save
