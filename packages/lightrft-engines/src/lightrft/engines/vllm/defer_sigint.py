"""Defers Ctrl-C to the end of a vLLM step: vLLM cannot continue after an interrupted step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def defer_sigint() -> Iterator[Callable[[], None]]:
    """Defer SIGINT until the body ends, or until it calls the function that it is given.

    Does nothing outside the main thread, to which Python delivers signals, or if SIGINT has no Python handler.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    pending: list[tuple[int, FrameType | None]] = []

    def deliver() -> None:
        while pending:
            handler(*pending.pop())

    signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, handler)
        deliver()
