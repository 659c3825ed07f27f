"""The server process of SGLang: its start, calls to it, and its end.

The server is in its own session: the terminal's Ctrl-C does not reach it, and one signal ends it with all its
child processes. It ends itself when this process is gone.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

import lightrft.config
from lightrft.config import EngineError
from lightrft.engines.sglang.arguments import IMPORTED_WITH_ON_CPU, server_variables
from lightrft.engines.sglang.launcher_client import VARIABLE, launch
from lightrft.engines.temporary_directory import TemporaryDirectory

logger = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds that the server has to end by itself, and that its processes have to end after they were killed."""


class ServerDied(EngineError):
    """The server process ended before it answered."""


class ServerProcess:
    """A server process, and the connection to it."""

    def __init__(self, arguments: Mapping[str, Any], timeout: float) -> None:
        """Start the server and its engine.

        Args:
            arguments: Arguments of ``sglang.Engine``.
            timeout: Seconds after which a call fails and the server is killed.

        Raises:
            EngineError: The engine does not start.
        """
        self._timeout, self._owner = timeout, os.getpid()
        self._directory = TemporaryDirectory("sglang")
        self._log = Path(self._directory.path) / "log"
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("wb") as log:
            variables = server_variables(
                os.environ, self._directory.path, on_cpu=arguments.get("device") == "cpu",
                ranks=arguments["tp_size"], cores=sorted(os.sched_getaffinity(0)),
            )  # fmt: skip
            self._pid = _started(variables, theirs.fileno(), log.fileno(), timeout)
        self._pidfd = os.pidfd_open(self._pid)
        self._connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self._pid, self._pidfd, self._connection, self._directory, self._owner)
        self.max_model_len: int = self.call("start", dict(arguments))
        """The longest sequence in tokens, prompt included."""

    @property
    def alive(self) -> bool:
        """Whether the server is running."""
        return self.end.alive and not _has_ended(self._pidfd)

    def call(self, name: str, *arguments: object, descriptor: int | None = None) -> Any:
        """Call a method of the server.

        Args:
            name: The method.
            *arguments: Its arguments.
            descriptor: A file descriptor to send after them.

        Returns: What the method returns.

        Raises:
            ServerDied: The server ended, or did not answer within the timeout.
            EngineError: The method raised an exception.
        """
        if not self.end.alive:
            raise ServerDied(
                f"{name}: expected SGLang's server to be running, but it has ended. Sync weights, which starts a new one"
            )
        try:
            self._connection.send((name, arguments))
            if descriptor is not None:
                send_handle(self._connection, descriptor, self._pid)
            answer = self._connection.recv() if self._connection.poll(self._timeout) else None
        except (EOFError, OSError) as error:
            raise self._died(f"died during {name!r}") from error
        except BaseException:  # the next call would take a late answer for its own
            self.end()
            raise
        if answer is None:
            raise self._died(f"did not answer {name!r} within {self._timeout:g} s (timeout)")
        return _unpacked(*answer)

    def _died(self, words: str) -> ServerDied:
        ended = _has_ended(self._pidfd, seconds=1.0)
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        self.end()
        tail = "\n  ".join(line for line in lines[-20:] if line.strip())
        return ServerDied(
            f"SGLang's server {words}{'' if ended else ', and was killed'}. The end of its log:\n  {tail or '(empty)'}"
        )

    def stop(self) -> None:
        """Ask the server to end, and kill what is left of it. May be called twice."""
        if self.end.alive and os.getpid() == self._owner:  # a fork closes only its own descriptors
            with contextlib.suppress(EOFError, OSError):
                self._connection.send(("stop", ()))
                self._connection.poll(GRACE)
        self.end()


def _unpacked(state: str, value: Any) -> Any:
    """The value of an answer; raises the error of a failed one."""
    if state == "value":
        return value
    class_name, message, trace = value
    error_class = getattr(lightrft.config, class_name, None)
    if isinstance(error_class, type) and issubclass(error_class, lightrft.config.LightRFTError):
        raise error_class(message)
    raise EngineError(f"SGLang raised {class_name}: {message}. Remove the cause, and try again\n{trace}")


def _started(variables: Mapping[str, str], connection: int, output: int, timeout: float) -> int:
    """Start a server process in a new session. Returns its id."""
    launcher = os.environ.get(VARIABLE)
    if launcher is not None and IMPORTED_WITH_ON_CPU.items() <= variables.items():
        try:
            return launch(launcher, variables, (connection, output), timeout)
        except ConnectionError as error:
            logger.warning(
                "SGLang's server: its launcher (lightrft.engines.sglang.launcher) has ended, see its output (%r). The server "
                "starts as a new Python, which takes longer", error,
            )  # fmt: skip
        except TimeoutError as error:
            raise EngineError(
                f"SGLang's server expected its launcher (lightrft.engines.sglang.launcher) to fork it within {timeout:g} s, got "
                f"no answer. See the launcher's output for the cause"
            ) from error
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lightrft.engines.sglang.server", str(connection)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(variables),
        pass_fds=[connection],
        start_new_session=True,
    )
    process.returncode = 0  # `_end` waits for it by its id
    return process.pid


def _has_ended(pidfd: int, seconds: float = 0.0) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


def _end(pid: int, pidfd: int, connection: Connection, directory: TemporaryDirectory, owner: int) -> None:
    connection.close()
    if os.getpid() != owner:  # this is a fork; the engine belongs to its parent
        return
    deadline = time.monotonic() + GRACE
    while _killed(pid) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):  # with a launcher it is not our child
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    os.close(pidfd)
    directory.remove()


def _killed(group: int) -> bool:
    """Kill a process group. Returns whether any process is left; zombies do not count, they may never be waited for."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return any(_runs_in(group, stat) for stat in Path("/proc").glob("[0-9]*/stat"))


def _runs_in(group: int, stat: Path) -> bool:
    try:
        state, _, process_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
    except OSError:  # it has ended
        return False
    return int(process_group) == group and state != "Z"
