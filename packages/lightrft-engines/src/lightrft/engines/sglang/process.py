"""The server process: its start, calls into it, and its end, however that comes.

It is a session of its own, so that the terminal's Ctrl-C reaches the training alone, and that one signal ends it with
all that it started. It ends itself when this process is gone.
"""

import contextlib
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
from lightrft.engines.own_folder import OwnFolder
from lightrft.engines.sglang.arguments import IMPORTED_WITH_ON_CPU, server_variables
from lightrft.engines.sglang.launching import VARIABLE, launch

GRACE = 10.0
"""Seconds that the server has to end by itself, and its processes to be gone after they were killed."""


class ServerDied(EngineError):
    """The server process is gone, with whatever it was asked to do."""


class ServerProcess:
    """One server process, and the connection to it."""

    def __init__(self, arguments: Mapping[str, Any], timeout: float) -> None:
        """``timeout``: seconds after which any call is given up, and the server ended."""
        self._timeout, self._owner = timeout, os.getpid()
        self._folder = OwnFolder("sglang")
        self._log = Path(self._folder.path) / "log"
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("wb") as log:
            variables = server_variables(
                os.environ, self._folder.path, on_cpu=arguments.get("device") == "cpu",
                ranks=arguments["tp_size"], cores=sorted(os.sched_getaffinity(0)),
            )  # fmt: skip
            self._pid = _started(variables, theirs.fileno(), log.fileno())
        self._gone = os.pidfd_open(self._pid)
        self._connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self._pid, self._gone, self._connection, self._folder, self._owner)
        self.longest: int = self.call("start", dict(arguments))
        """Tokens that a sequence may have, prompt and all."""

    @property
    def alive(self) -> bool:
        """Whether calls can be made."""
        return self.end.alive and not _has_ended(self._gone)

    def call(self, name: str, *arguments: Any, descriptor: int | None = None) -> Any:
        """Call a method of the server, lending it a file ``descriptor``; returns what it returns.

        Raises what it raises, or `ServerDied`, where it does not answer in time too.
        """
        if not self.end.alive:
            raise ServerDied(f"SGLang's server is not running, and was asked to {name}")
        try:
            self._connection.send((name, arguments))
            if descriptor is not None:
                send_handle(self._connection, descriptor, self._pid)
            answer = self._connection.recv() if self._connection.poll(self._timeout) else None
        except (EOFError, OSError) as error:
            raise self._died(f"died while it was asked to {name}") from error
        except BaseException:  # an answer that nobody waits for would be taken for that of the next call
            self.end()
            raise
        if answer is None:
            raise self._died(f"did not {name} within {self._timeout:g} s (timeout)")
        return _opened(*answer)

    def _died(self, words: str) -> ServerDied:
        ended = _has_ended(self._gone, seconds=1.0)
        said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        self.end()
        tail = "\n  ".join(line for line in said[-20:] if line.strip())
        return ServerDied(
            f"SGLang's server {words}{'' if ended else ', and was killed'}. Its last words:\n  {tail or '(none)'}"
        )

    def stop(self) -> None:
        """Ask it to end, and see to it that it has, with all that it started. May be called twice."""
        if self.end.alive and os.getpid() == self._owner:  # a fork ends nothing but its own handles
            with contextlib.suppress(EOFError, OSError):
                self._connection.send(("stop", ()))
                self._connection.poll(GRACE)
        self.end()


def _opened(state: str, value: Any) -> Any:
    """The value of an answer; raises the error of one that has failed."""
    if state == "value":
        return value
    kind, message, trace = value
    error_class = getattr(lightrft.config, kind, None)
    if isinstance(error_class, type) and issubclass(error_class, lightrft.config.LightRFTError):
        raise error_class(message)
    raise EngineError(f"SGLang raised {kind}: {message}\n{trace}")


def _started(variables: Mapping[str, str], connection: int, output: int) -> int:
    """Start a server process, a leader of a session of its own; returns its id."""
    launcher = os.environ.get(VARIABLE)
    if launcher is not None and IMPORTED_WITH_ON_CPU.items() <= variables.items():
        return launch(launcher, variables, (connection, output))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "lightrft.engines.sglang.server", str(connection)],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(variables),
        pass_fds=[connection],
        start_new_session=True,
    )
    process.returncode = 0  # it is waited for in `_end`, by its id
    return process.pid


def _has_ended(pidfd: int, seconds: float = 0.0) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


def _end(pid: int, pidfd: int, connection: Connection, folder: OwnFolder, owner: int) -> None:
    connection.close()
    if os.getpid() != owner:  # a fork, whose exit is not the engine's end
        return
    deadline = time.monotonic() + GRACE
    while _killed(pid) and time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):  # of a launcher it is no child
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    os.close(pidfd)
    folder.remove()


def _killed(group: int) -> bool:
    """Kill all in a process group; whether there were any left. Zombies are not: nobody may ever wait for them."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return any(_runs_in(group, stat) for stat in Path("/proc").glob("[0-9]*/stat"))


def _runs_in(group: int, stat: Path) -> bool:
    try:
        state, _, found = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
    except OSError:  # it is gone
        return False
    return int(found) == group and state != "Z"
