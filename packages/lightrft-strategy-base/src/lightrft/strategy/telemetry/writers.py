"""Calling a tracker so that it can neither stop nor delay the training.

`DirectWriter` calls it immediately, for a local file. `BackgroundWriter` calls it on a separate thread with a bounded queue, so a
tracker that waits for a network blocks only that thread. Both report the first failure with a remedy, and continue.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from lightrft.strategy.telemetry.log import logger
from lightrft.strategy.telemetry.trackers.tracker import RunInfo, Tracker

CAPACITY = 1024
"""Entries that wait for a tracker; further ones are dropped."""
CLOSE_TIMEOUT = 30.0
"""Seconds that `close` waits for a tracker."""
Entry = tuple[Mapping[str, float], int] | None
"""Metrics and their step. None only wakes the thread."""


class Writer(Protocol):
    """Passes metrics to a tracker."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Pass them on. Does not raise."""

    def close(self) -> None:
        """Write what is left, and close the tracker. Does not raise."""


class _Reporter:
    """Reports the first failure of a tracker."""

    def __init__(self, name: str) -> None:
        self._name, self._is_silent = name, False

    def failed(self, call: str, error: BaseException) -> None:
        """Report ``error``, which ``call`` of the tracker raised."""
        reason = f"{type(error).__name__}: {error}"
        if call == "start":
            self.say(f"could not start: {reason}. It gets no metrics in this run")
        else:
            self.say(f"failed to {call}: {reason}. Metrics may be missing there")

    def say(self, what: str) -> None:
        """Log a warning, once."""
        if not self._is_silent:
            self._is_silent = True
            logger.warning(
                "log: tracker %r %s. The training continues; further failures are not reported. Correct the cause (a full "
                "disk, the network, a missing login), or leave the tracker out",
                self._name,
                what,
            )


class DirectWriter:
    """Calls a tracker immediately. For a local file, which does not block the caller."""

    def __init__(self, name: str, tracker: Tracker, run: RunInfo) -> None:
        self._tracker, self._run, self.reporter = tracker, run, _Reporter(name)
        self._is_started: bool | None = None  # False: it failed

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Start the tracker if needed, and call it."""
        if self._is_started is None:
            self._is_started = self._try("start", lambda: self._tracker.start(self._run))
        if self._is_started:
            self._try("log", lambda: self._tracker.log(metrics, step))

    def close(self) -> None:
        """Close the tracker, if it was started."""
        if self._is_started:
            self._is_started = False
            self._try("close", self._tracker.close)

    def _try(self, call: str, function: Callable[[], None]) -> bool:
        try:
            function()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any failure of a tracker is reported, and only that
            self.reporter.failed(call, error)
            return False
        return True


class BackgroundWriter:
    """Calls a tracker on a thread that starts with the first metrics."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: RunInfo,
        *,
        capacity: int = CAPACITY,
        close_timeout: float = CLOSE_TIMEOUT,
    ) -> None:
        self._name, self._close_timeout = name, close_timeout
        self._direct = DirectWriter(name, tracker, run)
        self._queue: queue.Queue[Entry] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue ``metrics``, unless the queue is full."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"lightrft-tracker-{self._name}", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((metrics, step))
        except queue.Full:
            self._direct.reporter.say(
                f"is behind by {self._queue.maxsize} entries. Newer ones are dropped until it catches up"
            )

    def close(self) -> None:
        """Wait until everything is written, for a limited time."""
        if self._thread is None:
            return
        self._closing.set()
        with suppress(queue.Full):  # then the thread is not waiting for an entry
            self._queue.put_nowait(None)
        self._thread.join(self._close_timeout)
        if self._thread.is_alive():
            self._direct.reporter.say(
                f"did not finish within {self._close_timeout:g} s of close. Its last {self._queue.qsize()} entries may be lost"
            )
        self._thread = None

    def _work(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            entry = self._queue.get()
            if entry is not None:
                self._direct.log(*entry)
        self._direct.close()
