"""A process that has imported what workers need, and forks them: importing takes seconds, a fork milliseconds.

torch imports its compiler too, when it makes its first optimizer. Each rank has a nursery of its own, for ranks differ
in what differs between processes, such as the order of a set of strings; a strategy must bear that.

The driver asks over a socket. ``b"s"``, with the descriptors of a worker's connection, output and stack, and a message
that names its module and environment: start one; the answer has its pid. ``b"w"`` and a pid: how did it end? The nursery
ends when the driver does.
"""

import importlib
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from lightrft.conformance.driver import wire

PRELOADED = ("lightrft.conformance.interpreter", "torch._dynamo")
"""For the workers of the suite; not for those that use CUDA, which does not survive a fork."""
READY_SECONDS = 120.0


# As the driver sees it


class Child:
    """A worker's process."""

    def __init__(self, pid: int, nursery: "Nursery") -> None:
        self.pid, self._nursery = pid, nursery
        self._status: int | None = None
        self._descriptor = os.pidfd_open(pid)  # it is no zombie's: the nursery keeps it until it is asked

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, or does within ``seconds``."""
        end = select.poll()
        end.register(self._descriptor, select.POLLIN)
        return bool(end.poll(seconds * 1000))

    def status(self, seconds: float = 0.0) -> int | None:
        """Its exit status, negative for a signal; None where it has not ended, or its nursery has and cannot tell."""
        if self._status is None and self.ended(seconds):
            with suppress(wire.ConnectionLost):
                self._status = self._nursery.status_of(self.pid)
        return self._status

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def close(self) -> None:
        """Kill it, with all that it started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.status(READY_SECONDS)
        os.close(self._descriptor)


class Nursery:
    """One such process, and the driver's connection to it."""

    def __init__(self, preloaded: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it, and do not wait for it."""
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(READY_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *preloaded],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**environment}, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the nursery itself."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether somebody ended it."""
        return self._process.poll() is not None

    def start(self, module: str, environment: Mapping[str, str], descriptors: Sequence[int]) -> Child:
        """A worker that runs ``module``, as ``python -m`` does. Raises `wire.ConnectionLost` where there can be none.

        ``descriptors``: of its connection, its output, and the file for its stack.
        """
        asked = {"module": module, "environment": dict(environment)}
        return Child(self._ask(b"s", asked, descriptors)["pid"], self)

    def status_of(self, pid: int) -> int | None:
        """How a worker ended. Raises `wire.ConnectionLost`."""
        status: int | None = self._ask(b"w", {"pid": pid})["status"]
        return status

    def _ask(self, what: bytes, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        try:
            socket.send_fds(self._connection, [what], descriptors)
            wire.send(self._connection, message)
            return wire.receive(self._connection)
        except OSError as error:  # a timeout is one
            raise wire.ConnectionLost(f"the process that starts workers does not answer: {error}") from error

    def close(self) -> None:
        """End it; its workers are not ended."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


# As it is


def main() -> None:
    """Import what is named on the command line, then serve; a fork becomes the worker that was asked for."""
    descriptor, *preloaded = sys.argv[1:]
    for name in preloaded:
        with suppress(Exception):  # a worker that needs it will say so itself
            importlib.import_module(name)
    module = _serve(socket.socket(fileno=int(descriptor)))
    sys.argv[:] = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _serve(driver: socket.socket) -> str:
    """Start workers until the driver is gone; returns in a worker only, with its module."""
    with driver:
        while True:
            what, descriptors, _, _ = socket.recv_fds(driver, 1, 3)
            if not what:
                os._exit(0)
            try:
                asked = wire.receive(driver)
                if what == b"w":
                    wire.send(driver, {"status": _status_of(asked["pid"])})
                    continue
                pid = os.fork()
                if not pid:
                    break
                for it in descriptors:
                    os.close(it)
                wire.send(driver, {"pid": pid})
            except wire.ConnectionLost:
                os._exit(0)
    _become_a_worker(asked["environment"], *descriptors)
    module: str = asked["module"]
    return module


def _status_of(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become_a_worker(environment: Mapping[str, str], connection: int, output: int, stacks: int) -> None:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment, LIGHTRFT_CONFORMANCE_FDS=f"{connection},{stacks}")
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own stream begins anew by itself


if __name__ == "__main__":
    main()
