"""A worker process, seen from the driver: its connection, output, stack and exit."""

import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Self

from lightrft.conformance.driver import wire
from lightrft.conformance.driver.fork_server import Child, ForkServer

STACK_SIGNAL = signal.SIGUSR1
TAIL_BYTES = 4000
SEND_SECONDS = 30.0


class WorkerProcess:
    """A process in its own session, with a socket for messages and a pipe for its output.

    Only the last `TAIL_BYTES` of the output are kept, in memory.
    """

    def __init__(self, process: Child, connection: socket.socket, output: int, stacks: int) -> None:
        self.process, self.connection, self.output, self._stacks = process, connection, output, stacks
        self._printed = bytearray()
        os.set_blocking(output, False)

    @classmethod
    def start(cls, fork_server: ForkServer, module: str, environment: Mapping[str, str]) -> Self:
        """Start ``module``. Raises `wire.ConnectionLost` if the fork server is gone."""
        connection, other_end = socket.socketpair()
        readable, writable = os.pipe()
        stacks = os.memfd_create("stacks")
        try:
            process = fork_server.start(module, environment, (other_end.fileno(), writable, stacks))
        except wire.ConnectionLost:
            connection.close()
            os.close(readable)
            os.close(stacks)
            raise
        finally:
            other_end.close()
            os.close(writable)
        return cls(process, connection, readable, stacks)

    # Messages

    def send(self, message: wire.Message) -> None:
        """Send a message. Raises `wire.ConnectionLost`, also if the worker does not read it.

        Discards earlier output, so that `tail` belongs to the last program.
        """
        self.tail()
        self._printed.clear()
        self.connection.settimeout(SEND_SECONDS)
        wire.send(self.connection, message)

    def receive(self, seconds: float) -> wire.Message:
        """Read the message that is arriving. Raises `wire.ConnectionLost` if it does not arrive completely."""
        self.connection.settimeout(max(0.1, seconds))
        try:
            return wire.receive(self.connection)
        except TimeoutError as error:
            raise wire.ConnectionLost("the worker sent an incomplete message") from error

    # Output

    def read_output(self) -> bool:
        """Read what was printed; False at the end of the output."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return True
        self._printed += data
        del self._printed[:-TAIL_BYTES]
        return bool(data)

    def tail(self) -> str:
        """The end of the output."""
        for _ in range(16):  # as much as a pipe holds
            if not self.read_output():
                break
        return self._printed.decode(errors="replace").strip()

    # Its exit

    def stack(self) -> str:
        """The stacks of all threads, from faulthandler; the last output if the process does not respond."""
        before = os.fstat(self._stacks).st_size
        self.process.signal(STACK_SIGNAL)
        for _ in range(40):
            time.sleep(0.05)
            if (size := os.fstat(self._stacks).st_size) > before:
                time.sleep(0.05)
                return os.pread(self._stacks, max(size, 1 << 16), before).decode(errors="replace").strip()
        return f"no stack: the process does not respond; last output: {self.tail() or 'none'}"

    def describe_exit(self) -> str:
        """How the process ended, and its last output."""
        return f"{_describe(self.process.status(1.0))}; last output: {self.tail() or 'none'}"

    def kill(self) -> None:
        """Kill the process and everything it started in its session."""
        self.process.close()
        self.connection.close()
        os.close(self.output)
        os.close(self._stacks)


def _describe(status: int | None) -> str:
    if status is None:
        return "closed its connection"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
