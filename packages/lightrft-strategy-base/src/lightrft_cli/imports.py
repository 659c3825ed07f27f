"""Whether registered strategies and engines can be imported, each tried in a separate process.

A crash in one, for example of a library built for another GPU, then ends only that process.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint

TIMEOUT = 600
"""Seconds for one import."""
_IMPORT = """
import sys
from importlib import import_module
from importlib.metadata import EntryPoint
from importlib.util import find_spec
name, value, group = sys.argv[1:]
EntryPoint(name, value, group).load()
if find_spec(name):  # an engine or a backend of that name, which the entry point imports only when it is used
    import_module(name)
"""


def import_errors(points: Sequence[EntryPoint]) -> list[str]:
    """Return why each entry point cannot be imported; "" if it can."""
    processes: list[subprocess.Popen[str]] = []
    commands = [[sys.executable, "-c", _IMPORT, point.name, point.value, point.group] for point in points]
    with ThreadPoolExecutor(max_workers=2) as pool:
        try:
            return list(pool.map(lambda command: error_of(command, processes), commands))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            raise


def error_of(command: Sequence[str], started: list[subprocess.Popen[str]] | None = None) -> str:
    """Run ``command``; return "" if it succeeds, else the last line that it wrote to stderr, or how it ended.

    Args:
        command: The program and its arguments.
        started: Gets the process, for a caller in another thread that may have to end it.
    """
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        if started is not None:
            started.append(process)
        try:
            errors = process.communicate(timeout=TIMEOUT)[1]
        except BaseException as error:  # also Ctrl-C, if there is no other thread
            process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"did not finish within {TIMEOUT} s"
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    lines = [line for line in errors.splitlines() if line.strip()]
    return "" if not process.returncode else (lines or [f"exit status {process.returncode}"])[-1]
