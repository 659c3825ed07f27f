"""Runs a command whose SGLang servers start faster, as forks of a process that has imported SGLang.

    python -m lightrft.engines.sglang.launcher COMMAND [ARGUMENT]...

For test suites on a CPU, which start many short-lived engines. A server is a fork of this process in place of a new
Python, and otherwise the same. It ends with the engine that asked for it or with this process, whichever comes first. The
command finds the launcher by the environment variable `VARIABLE`; the launcher ends with the command.
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
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from lightrft.engines.sglang.arguments import IMPORTED_WITH, IMPORTED_WITH_ON_CPU
from lightrft.engines.sglang.launcher_client import LENGTH, VARIABLE, receive


def _fork_servers(listener: socket.socket) -> None:
    """Fork a server for each connection. A request that fails closes its connection, and the next is served."""
    while True:
        client, _ = listener.accept()
        try:
            with client:
                _fork_server(client, listener)
        except Exception:  # noqa: BLE001  the client has gone, or this system has no memory for another process
            traceback.print_exc()


def _fork_server(client: socket.socket, listener: socket.socket) -> None:
    header, descriptors, _, _ = socket.recv_fds(client, LENGTH.size, 2)
    try:
        environment = pickle.loads(receive(client, LENGTH.unpack(header)[0]))  # noqa: S301  from the same user
        if os.fork() == 0:
            listener.close()
            _become_server(client, environment, *descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _become_server(client: socket.socket, environment: Mapping[str, str], connection: int, output: int) -> None:
    from lightrft.engines.sglang.server import serve

    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        client.sendall(LENGTH.pack(os.getpid()))  # from here on its process group can be killed
        client.close()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # TMPDIR has changed
        serve(Connection(connection))
        code = 0
    finally:
        os._exit(code)


def main() -> int:
    """Run the command with a launcher. Returns its exit status."""
    command = sys.argv[1:]
    if not command:
        raise SystemExit(f"{__doc__}")
    with (
        tempfile.TemporaryDirectory(prefix="lightrft-sglang-launcher-") as directory,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        address = str(Path(directory) / "socket")
        listener.bind(address)
        listener.listen()
        process = subprocess.Popen(command, env={**os.environ, VARIABLE: address})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the command
        forker = os.fork()
        if forker == 0:
            _be_forker(listener)
        listener.close()  # so that connections are refused, and do not wait forever, if the forker has ended
        try:
            return process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(forker, signal.SIGTERM)
            os.waitpid(forker, 0)


def _be_forker(listener: socket.socket) -> None:
    try:
        os.environ.update(IMPORTED_WITH | IMPORTED_WITH_ON_CPU)
        from lightrft.engines.sglang import library

        library.load()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the servers
        assert threading.active_count() == 1, threading.enumerate()  # a fork would keep the locks of other threads
        _fork_servers(listener)
    except Exception:  # noqa: BLE001  this process ends here, with any error
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
