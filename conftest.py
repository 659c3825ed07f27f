"""For the tests of every package: what one leaves behind in its process is an error.

After each test: environment variables, process groups, threads and the working directory are as they were. At the
end of a run: no child process and no socket is left. (Fixtures of a wider scope may keep those between tests.)
Unclosed files are warnings of Python's, which are errors here. Linux only for what is read from /proc.
"""

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 2.0
"""Seconds in which what is ending may end."""
STANDING = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that change by themselves: pytest's, between tests, and those that DeepSpeed and torch set when imported."""
STANDING_THREADS = {"tqdm_monitor"}
"""Of progress bars: it stays once there has been one."""
STANDING_CHILDREN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Python's own helpers, which stay for as long as the process does."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--installed", action="store_true", help="Fail if a package under test comes from its sources")


def pytest_sessionstart(session: pytest.Session) -> None:
    if not session.config.getoption("--installed"):
        return
    import lightrft

    elsewhere = [path for path in lightrft.__path__ if not Path(path).is_relative_to(sys.prefix)]
    if elsewhere:
        raise pytest.UsageError(f"--installed, and lightrft is imported from {', '.join(elsewhere)}")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Around each test."""
    before = _state()
    yield
    leaked = _changes(_state, before)
    assert not leaked, f"the test left behind: {leaked}"


@pytest.fixture(autouse=True, scope="session")
def _nothing_left() -> Iterator[None]:
    """Around a run."""
    before = _system()
    yield
    leaked = _changes(_system, before)
    assert not leaked, f"this run, in one of its tests or fixtures, left behind: {leaked}"


def _changes(read: Callable[[], dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """What is not as it was before, by name: was and is. Waits for what is on its way out."""
    deadline = time.monotonic() + PATIENCE
    while (after := read()) != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    return {name: (before.get(name), after.get(name)) for name in before | after if before.get(name) != after.get(name)}


def _state() -> dict[str, Any]:
    found: dict[str, Any] = {f"${name}": value for name, value in os.environ.items() if name not in STANDING}
    found |= {
        f"thread {thread.name!r}": True for thread in threading.enumerate() if thread.name not in STANDING_THREADS
    }
    distributed = sys.modules.get("torch.distributed")
    found["process group"] = bool(distributed and distributed.is_available() and distributed.is_initialized())
    found["working directory"] = os.getcwd()
    return found


def _system() -> dict[str, Any]:
    return _children() | _sockets()


def _children() -> dict[str, str]:
    found = {}
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if not any(name in command for name in STANDING_CHILDREN):
                found[f"process {pid}"] = command
    return found


def _sockets() -> dict[str, str]:
    found = {}
    for descriptor in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:  # the one that listed them
            continue
        if target.startswith("socket:"):
            found[target] = "open"
    return found
