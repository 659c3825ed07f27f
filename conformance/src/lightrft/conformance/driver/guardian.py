"""Ends the workers when their driver is gone, however it went: SIGKILL leaves it no time to do so itself. Then it removes
what they wrote, a directory that is named on the command line.

A process of its own, beside the workers, that hears from the driver over a pipe: a line ``+PID`` for a worker that
was started, ``-PID`` for one that was ended. When the pipe closes, what is left is killed, each worker with all
that it started in its session. It imports next to nothing, and starts in a few milliseconds.
"""

import os
import shutil
import signal
import sys


def main() -> None:
    """Serve until the pipe, on standard input, is closed."""
    sessions: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            sessions.add(pid)
        else:
            sessions.discard(pid)
    for pid in sessions:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
