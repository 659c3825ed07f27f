"""One worker process as the driver sees it: its connection, its output, its stack, its end."""

import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any, Self

from lightrft.conformance.driver import wire
from lightrft.conformance.driver.nursery import Child, Nursery

STACK_SIGNAL = signal.SIGUSR1
TAIL_BYTES = 4000
SEND_SECONDS = 30.0


class Worker:
    """A process in a session of its own, with a socket for messages and a pipe for whatever it prints.

    Of its output only the end is kept, and nothing of it touches a disk.
    """

    def __init__(self, process: Child, connection: socket.socket, output: int, stacks: int) -> None:
        self.process, self.connection, self.output, self._stacks = process, connection, output, stacks
        self._printed = bytearray()
        os.set_blocking(output, False)

    @classmethod
    def start(cls, nursery: Nursery, module: str, environment: Mapping[str, str]) -> Self:
        """Start ``module``. Raises `wire.ConnectionLost` where the nursery is gone."""
        ours, theirs = socket.socketpair()
        readable, writable = os.pipe()
        stacks = os.memfd_create("stacks")
        try:
            process = nursery.start(module, environment, (theirs.fileno(), writable, stacks))
        except wire.ConnectionLost:
            ours.close()
            os.close(readable)
            os.close(stacks)
            raise
        finally:
            theirs.close()
            os.close(writable)
        return cls(process, ours, readable, stacks)

    # Messages

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; raises `wire.ConnectionLost`, also where the worker does not take it.

        What was printed before is forgotten: last words belong to the last program.
        """
        self.tail()
        self._printed.clear()
        self.connection.settimeout(SEND_SECONDS)
        wire.send(self.connection, message)

    def receive(self, seconds: float) -> dict[str, Any]:
        """The message that is arriving; raises `wire.ConnectionLost` where it does not arrive whole."""
        self.connection.settimeout(max(0.1, seconds))
        try:
            return wire.receive(self.connection)
        except TimeoutError as error:
            raise wire.ConnectionLost("it sent a part of a message and no more") from error

    # Output

    def read_output(self) -> bool:
        """Take what was printed; False where there will be no more."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return True
        self._printed += data
        del self._printed[:-TAIL_BYTES]
        return bool(data)

    def tail(self) -> str:
        """The last that it printed."""
        for _ in range(16):  # what a pipe holds, once over
            if not self.read_output():
                break
        return self._printed.decode(errors="replace").strip()

    # Its end

    def stack(self) -> str:
        """Where all its threads are now, by faulthandler; its last words where it cannot say."""
        before = os.fstat(self._stacks).st_size
        self.process.signal(STACK_SIGNAL)
        for _ in range(40):
            time.sleep(0.05)
            if (size := os.fstat(self._stacks).st_size) > before:
                time.sleep(0.05)
                return os.pread(self._stacks, max(size, 1 << 16), before).decode(errors="replace").strip()
        return f"it does not say where it is; its last words: {self.tail() or 'none'}"

    def exit_words(self) -> str:
        """How it ended, and its last words."""
        return f"{_words(self.process.status(1.0))}; its last words: {self.tail() or 'none'}"

    def kill(self) -> None:
        """End it and whatever it started in its session."""
        self.process.close()
        self.connection.close()
        os.close(self.output)
        os.close(self._stacks)


def _words(status: int | None) -> str:
    if status is None:
        return "closed its connection"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
