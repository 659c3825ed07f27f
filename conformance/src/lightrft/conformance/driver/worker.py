"""One rank: runs the programs that the driver sends and answers with observations.

The code under test may print, change directory, fork or exit: the driver talks to this process over a separate socket
and does not parse its output.
"""

import faulthandler
import os
import socket
import sys
import traceback
from collections.abc import Callable

from lightrft.conformance.driver import wire
from lightrft.conformance.driver.worker_process import STACK_SIGNAL


def main() -> None:
    """Run programs until the driver closes the connection."""
    connection_fd, stacks_fd = map(int, os.environ.pop("LIGHTRFT_CONFORMANCE_FDS").split(","))
    faulthandler.register(STACK_SIGNAL, file=stacks_fd, all_threads=True)
    connection = socket.socket(fileno=connection_fd)
    connection.set_inheritable(False)
    rank = int(os.environ.pop("LIGHTRFT_CONFORMANCE_RANK"))
    home, owner = os.getcwd(), os.getpid()

    from lightrft.conformance.interpreter import run_program  # slow to import: register the stack dump first

    wire.send(connection, {"number": 0})
    while True:
        try:
            command = wire.receive(connection)
        except wire.ConnectionLost:
            os._exit(0)
        answer = _answer(command, rank, run_program)
        if os.getpid() != owner:  # a process that the code under test forked returned here
            os._exit(0)
        os.chdir(home)
        try:
            wire.send(connection, answer)
        except wire.ConnectionLost:
            print("the code under test closed the connection to the driver", flush=True)
            os._exit(9)


def _answer(command: wire.Message, rank: int, run: Callable[[wire.Message, int], list[object]]) -> wire.Message:
    try:
        return {"number": command["number"], "observations": run(command["program"], rank)}
    except BaseException:  # noqa: BLE001
        # an error of the suite itself: those of the code under test are observations
        return {"number": command["number"], "broken": traceback.format_exc()}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
