"""A process that imports what workers need and forks them: an import takes seconds, a fork milliseconds.

Each rank has its own fork server, because real ranks differ in per-process state, such as the iteration order of
a set of strings, and a strategy must tolerate that.

The driver sends requests over a socket. ``b"s"`` starts a worker: it comes with the descriptors of the worker's
connection, output and stack file, and with a message that names the module and the environment; the answer is the
worker's pid. ``b"w"`` with a pid asks for the exit status of a worker. ``b"c"``, with the descriptor of a socket and a
scratch directory, makes a copy of the fork server for another driver; the answer is its pid. A fork server that makes
copies starts no workers.

The fork server also reaps orphans. If the driver goes away, even by SIGKILL, the socket closes; the fork server then
kills the workers that are left, with everything they started in their sessions, and removes the scratch directory. While it
imports, a thread watches the socket: on an overloaded machine an import takes minutes, or never ends.
"""

import gc
import importlib
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import NoReturn, Self

from lightrft.conformance.driver import wire

PRELOADED = ("lightrft.conformance.interpreter", "torch._dynamo")
"""For the suite's own workers. torch imports its compiler when it makes its first optimizer.

Workers that use CUDA preload nothing, because CUDA does not survive a fork.
"""
READY_SECONDS = 120.0


def load_before_fork(modules: Sequence[str]) -> None:
    """Import ``modules`` for all processes that are forked later, and exclude them from garbage collection."""
    gc.disable()
    for name in modules:
        with suppress(Exception):  # the process that needs the module reports the error itself
            importlib.import_module(name)
    gc.enable()
    gc.freeze()


# The driver's side


class Child:
    """A worker's process."""

    def __init__(self, pid: int, fork_server: "ForkServer") -> None:
        self.pid, self._fork_server = pid, fork_server
        self._status: int | None = None
        self._descriptor = os.pidfd_open(pid)  # the pid cannot be reused yet: the fork server has not waited for it

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether the process has ended, or ends within ``seconds``."""
        return _readable(self._descriptor, seconds)

    def status(self, seconds: float = 0.0) -> int | None:
        """The exit status, negative for a signal; None while the process runs, or if its fork server is gone."""
        if self._status is None and self.ended(seconds):
            with suppress(wire.ConnectionLost):
                self._status = self._fork_server.status_of(self.pid)
        return self._status

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def close(self) -> None:
        """Kill the process and everything it started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.status(READY_SECONDS)
        os.close(self._descriptor)


class ForkServer:
    """A fork server and the driver's connection to it."""

    def __init__(
        self, pid: int, connection: socket.socket, directory: Path, process: "subprocess.Popen[bytes] | None" = None
    ) -> None:
        self.pid, self._connection, self.directory = pid, connection, directory
        self._process = process
        """The same process, if it is a child of this one. A copy is a child of its original."""
        self._descriptor = os.pidfd_open(pid)  # the pid cannot be reused yet: the parent has not waited for it
        connection.settimeout(READY_SECONDS)

    @classmethod
    def launch(cls, preloaded: Sequence[str], environment: Mapping[str, str], directory: Path) -> Self:
        """Start the process without waiting for it. It removes ``directory`` if it outlives the driver."""
        connection, other_end = socket.socketpair()
        with other_end:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other_end.fileno()), str(directory), *preloaded],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**environment}, pass_fds=[other_end.fileno()], start_new_session=True,
            )  # fmt: skip
        return cls(process.pid, connection, directory, process)

    def copy(self, directory: Path) -> Self:
        """Start a copy of this fork server, with what it has imported, for a driver in another process.

        The copy lives on when this fork server ends. Raises `wire.ConnectionLost`.
        """
        connection, other_end = socket.socketpair()
        with other_end, ExitStack() as stack:
            stack.callback(connection.close)
            pid = self._ask(b"c", {"directory": str(directory)}, [other_end.fileno()])["pid"]
            copied = type(self)(pid, connection, directory)
            stack.pop_all()
        return copied

    @property
    def ended(self) -> bool:
        """Whether the fork server has ended."""
        return _readable(self._descriptor)

    def start(self, module: str, environment: Mapping[str, str], descriptors: Sequence[int]) -> Child:
        """Start a worker that runs ``module``, as ``python -m`` does.

        Args:
            module: The module to run as ``__main__``.
            environment: The complete environment of the worker.
            descriptors: Those of the worker's connection, its output, and the file for its stack.

        Raises:
            wire.ConnectionLost: The fork server does not answer.
        """
        request = {"module": module, "environment": dict(environment)}
        return Child(self._ask(b"s", request, descriptors)["pid"], self)

    def status_of(self, pid: int) -> int | None:
        """The exit status of a worker. Raises `wire.ConnectionLost`."""
        status: int | None = self._ask(b"w", {"pid": pid})["status"]
        return status

    def _ask(self, what: bytes, message: wire.Message, descriptors: Sequence[int] = ()) -> wire.Message:
        try:
            socket.send_fds(self._connection, [what], descriptors)
            wire.send(self._connection, message)
            return wire.receive(self._connection)
        except OSError as error:  # a timeout is one
            raise wire.ConnectionLost(f"the fork server does not answer: {error}") from error

    def close(self) -> None:
        """End the fork server, and leave its workers and copies alone. Does nothing after `release`. Idempotent."""
        if self._connection.fileno() < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)  # closing first would make it kill its workers
        _readable(self._descriptor, READY_SECONDS)
        if self._process is not None:
            self._process.wait()
        self.release()

    def release(self) -> None:
        """Leave the fork server to another process that has its connection. Idempotent."""
        if self._connection.fileno() >= 0:
            self._connection.close()
            os.close(self._descriptor)


def _readable(descriptor: int, seconds: float = 0.0) -> bool:
    """Whether a descriptor becomes readable within ``seconds``. A process's descriptor is readable once it has ended."""
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    return bool(ready.poll(seconds * 1000))


# The fork server's side


def main() -> None:
    """Import the modules named on the command line, then serve; a fork becomes the worker that was asked for."""
    descriptor, directory, *preloaded = sys.argv[1:]
    driver = socket.socket(fileno=int(descriptor))
    with _ending_without(driver, Path(directory)):
        load_before_fork(preloaded)
    module = _serve(driver, Path(directory))
    sys.argv[:] = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def _ending_without(driver: socket.socket, directory: Path) -> Iterator[None]:
    """End this process as soon as the driver is gone. The thread ends with the body: a fork must not find it running."""
    imported = os.eventfd(0)
    ends = select.poll()
    ends.register(driver, 0)  # only its hang-up: requests may wait
    ends.register(imported, select.POLLIN)

    def watch() -> None:
        if imported not in dict(ends.poll()):
            _reap_orphans(set(), directory)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(imported, 1)
        thread.join()
        os.close(imported)


def _serve(driver: socket.socket, directory: Path) -> str:
    """Start workers and copies until the driver is gone; returns only in a worker, with its module."""
    workers: set[int] = set()
    while True:
        what, descriptors, _, _ = socket.recv_fds(driver, 1, 3)
        if not what:
            _reap_orphans(workers, directory)
        try:
            request = wire.receive(driver)
            if what == b"w":
                status = _status_of(request["pid"])
                workers -= set() if status is None else {request["pid"]}
                wire.send(driver, {"status": status})
                continue
            if what == b"c":
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps copies: nobody asks for their status
            pid = os.fork()
            if not pid:
                break
            if what == b"s":
                workers.add(pid)
            for descriptor in descriptors:
                os.close(descriptor)
            wire.send(driver, {"pid": pid})
        except wire.ConnectionLost:
            _reap_orphans(workers, directory)
    driver.close()
    if what == b"c":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return _serve(socket.socket(fileno=descriptors[0]), Path(request["directory"]))
    _become_worker(request["environment"], *descriptors)
    module: str = request["module"]
    return module


def _status_of(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _reap_orphans(workers: set[int], directory: Path) -> NoReturn:
    """Kill the remaining workers with their sessions, remove what they wrote, and exit."""
    for pid in workers:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def _become_worker(environment: Mapping[str, str], connection: int, output: int, stacks: int) -> None:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment, LIGHTRFT_CONFORMANCE_FDS=f"{connection},{stacks}")
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python reseeds its own generator after a fork; NumPy does not


if __name__ == "__main__":
    main()
