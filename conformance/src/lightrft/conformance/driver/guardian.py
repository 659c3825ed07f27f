"""Ends the workers when their driver is gone, however it went: SIGKILL leaves it no time to do so itself. Then it removes
what they wrote, a directory that is named on the command line, unless the driver says that it sees to that itself.

A process of its own, beside the workers, that hears from the driver over a pipe: a line ``+PID`` for a worker that
was started, ``-PID`` for one that was ended, ``.`` for the end of a driver that tidies up. When the pipe closes, what is left is killed, each worker with all
that it started in its session. It imports next to nothing, and starts in a few milliseconds.
"""

import os
import shutil
import signal
import sys


def main() -> None:
    """Serve until the pipe, on standard input, is closed."""
    sessions: set[int] = set()
    tidied = False
    for line in sys.stdin:
        sign, pid = line[0], line[1:].strip()
        if sign == "+":
            sessions.add(int(pid))
        elif sign == "-":
            sessions.discard(int(pid))
        else:
            tidied = True
    for pid in sessions:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if not tidied:
        shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
