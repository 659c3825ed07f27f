"""How commands end on Ctrl-C and SIGTERM: they clean up, say so in one line, and exit with 130 or 143."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruptions:
    """The signal that interrupted a command, if one did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def handle(self, number: int, _: FrameType | None) -> None:
        """Raise KeyboardInterrupt, once: further signals must not interrupt the cleanup."""
        if self.signal is None:
            self.signal = signal.Signals(number)
            raise KeyboardInterrupt

    def note(self) -> None:
        """Take note of an interruption that came without a signal to `handle`, as in a thread."""
        self.signal = self.signal or signal.SIGINT

    @property
    def exit_code(self) -> int:
        """As shells report it: 128 and the number of the signal."""
        assert self.signal is not None
        return 128 + self.signal

    @property
    def line(self) -> str:
        """What to print."""
        assert self.signal is not None
        return f"interrupted by {self.signal.name}"


@contextmanager
def interruptible() -> Iterator[Interruptions]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt in the body; a signal that is ignored, as by nohup, stays so.

    Does not change handlers outside the main thread, to which Python delivers signals.
    """
    interruptions = Interruptions()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in SIGNALS}
    handled = {number: handler for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)}
    for number in handled:
        signal.signal(number, interruptions.handle)
    try:
        yield interruptions
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
