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
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(_import_error, points))


def _import_error(point: EntryPoint) -> str:
    return error_of([sys.executable, "-c", _IMPORT, point.name, point.value, point.group])


def error_of(command: Sequence[str]) -> str:
    """Run ``command``; return "" if it succeeds, else the last line that it wrote to stderr, or how it ended."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"did not finish within {TIMEOUT} s"
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if not done.returncode else (lines or [f"exit status {done.returncode}"])[-1]
