"""Ctrl-C comes where it does no harm: between two steps of vLLM, which a step that was left could not go on from."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def put_off() -> Iterator[Callable[[], None]]:
    """Put Ctrl-C off until the end of the body, or until the body calls what it gets.

    Nothing is put off outside the main thread, where Python delivers no signals, or where nobody in Python handles it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return
    came: list[tuple[int, Any]] = []

    def deliver() -> None:
        while came:
            handler(*came.pop())

    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, handler)
        deliver()
