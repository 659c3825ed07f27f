"""Run a command whose SGLang servers start in a fraction of the time: they are forks of one that has imported SGLang.

    python -m lightrft.engines.sglang.launcher COMMAND [ARGUMENT]...

For test suites on a CPU, where engines are many and short-lived. A server starts out of this process instead of a new
Python, and is otherwise the same; it outlives neither the engine that asked for it nor this process. The command finds
the launcher by the environment variable `VARIABLE`, and its end is the launcher's.
"""

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from lightrft.engines.sglang.arguments import IMPORTED_WITH, IMPORTED_WITH_ON_CPU
from lightrft.engines.sglang.launching import LENGTH, VARIABLE, received


def _fork_servers(listener: socket.socket) -> None:
    """Fork a server for each that asks."""
    while True:
        asking, _ = listener.accept()
        with asking:
            header, descriptors, _, _ = socket.recv_fds(asking, LENGTH.size, 2)
            environment = pickle.loads(received(asking, LENGTH.unpack(header)[0]))  # noqa: S301  our own user's
            if os.fork() == 0:
                listener.close()
                _become_server(asking, environment, *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _become_server(asking: socket.socket, environment: Mapping[str, str], connection: int, output: int) -> None:
    from lightrft.engines.sglang.server import serve

    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        asking.sendall(LENGTH.pack(os.getpid()))  # from here on it can be ended with all that it starts
        asking.close()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # it is another now
        serve(Connection(connection))
        code = 0
    finally:
        os._exit(code)


def main() -> int:
    command = sys.argv[1:]
    if not command:
        raise SystemExit(f"{__doc__}")
    with (
        tempfile.TemporaryDirectory(prefix="lightrft-sglang-launcher-") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        address = str(Path(folder) / "socket")
        listener.bind(address)
        listener.listen()
        started = subprocess.Popen(command, env={**os.environ, VARIABLE: address})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the command
        forker = os.fork()
        if forker == 0:
            _be_forker(listener)
        try:
            return started.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(forker, signal.SIGTERM)
            os.waitpid(forker, 0)


def _be_forker(listener: socket.socket) -> None:
    try:
        os.environ.update(IMPORTED_WITH | IMPORTED_WITH_ON_CPU)
        from lightrft.engines.sglang import library

        library.load()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
        assert threading.active_count() == 1, threading.enumerate()  # a fork would leave their locks locked
        _fork_servers(listener)
    finally:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
