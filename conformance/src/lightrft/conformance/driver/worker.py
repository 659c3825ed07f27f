"""One rank: runs the programs that the driver sends, and answers with observations.

Whatever the code under test does to this process, printing, changing directory, forking, exiting, is this
process's business: the driver speaks to it over a socket of its own and reads no output of it.
"""

import faulthandler
import os
import socket
import sys
import traceback
from typing import Any

from lightrft.conformance.driver import wire
from lightrft.conformance.driver.watched import STACK_SIGNAL


def main() -> None:
    """Serve until the driver closes the connection."""
    connection_fd, stacks_fd = map(int, os.environ.pop("LIGHTRFT_CONFORMANCE_FDS").split(","))
    faulthandler.register(STACK_SIGNAL, file=stacks_fd, all_threads=True)
    connection = socket.socket(fileno=connection_fd)
    connection.set_inheritable(False)
    rank = int(os.environ.pop("LIGHTRFT_CONFORMANCE_RANK"))
    home, owner = os.getcwd(), os.getpid()

    from lightrft.conformance.interpreter import run_program  # slow to import: after the stack can be asked for

    wire.send(connection, {"number": 0})
    while True:
        try:
            command = wire.receive(connection)
        except wire.ConnectionLost:
            os._exit(0)
        answer = _answer(command, rank, run_program)
        if os.getpid() != owner:  # a fork of the code under test came back here
            os._exit(0)
        os.chdir(home)
        try:
            wire.send(connection, answer)
        except wire.ConnectionLost:
            print("the code under test closed the connection over which it is judged", flush=True)
            os._exit(9)


def _answer(command: dict[str, Any], rank: int, run: Any) -> dict[str, Any]:
    try:
        return {"number": command["number"], "observations": run(command["program"], rank)}
    except BaseException:  # noqa: BLE001
        # not of the code under test, whose errors are observations, but of the suite itself
        return {"number": command["number"], "broken": traceback.format_exc()}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
