"""Checks for the tests of every package: a test that leaves something behind in its process is an error.

After each test: environment variables, process groups, threads and the working directory are as they were. At the
end of a run: no child process and no socket is left. (Fixtures of a wider scope may keep those between tests.)
Unclosed files are warnings of Python's, which are errors here. Linux only for what is read from /proc.

Hypothesis draws the same examples in every run. With ``LIGHTRFT_HYPOTHESIS_PROFILE=nightly`` it draws others each time,
and prints a failing one as the ``@example(...)`` to add.
"""

import gc
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 2.0
"""Seconds to wait for threads, files and processes that are being closed."""
STANDING = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"}
"""Variables that tests do not change: pytest's own, and those that DeepSpeed and torch set when imported."""
STANDING_THREADS = {"tqdm_monitor"}
"""Of progress bars: it stays once there has been one."""
STANDING_CHILDREN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Python's own helper processes, which live as long as the process."""


if importlib.util.find_spec("hypothesis"):  # the tests of some packages do without
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow],
        report_multiple_bugs=False,
    )  # fmt: skip
    settings.register_profile("nightly", settings.get_profile("repeatable"), derandomize=False, max_examples=1000)
    settings.load_profile(os.environ.get("LIGHTRFT_HYPOTHESIS_PROFILE", "repeatable"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what Hypothesis found as an example to pin."""
    report = yield
    for note in getattr(call.excinfo and call.excinfo.value, "__notes__", ()):
        if arguments := note.partition(f": {item.originalname}(")[2]:  # "Failing test case: test_it(value=1)"
            report.sections.append(("pinned example to add", f"@example({arguments}"))
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--installed", action="store_true", help="Fail if a package under test comes from its sources")


def pytest_sessionstart(session: pytest.Session) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background job; child processes inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not session.config.getoption("--installed"):
        return
    import lightrft

    sources = [path for path in lightrft.__path__ if not Path(path).is_relative_to(sys.prefix)]
    if sources:
        raise pytest.UsageError(
            f"--installed: expected lightrft in {sys.prefix}; it is imported from {', '.join(sources)}"
        )


@pytest.fixture(autouse=True)
def _test_leaks_nothing() -> Iterator[None]:
    before = _state()
    yield
    leaked = _changes(_state, before)
    assert not leaked, f"the test left behind (before, after): {leaked}"


@pytest.fixture(autouse=True, scope="session")
def _run_leaks_nothing() -> Iterator[None]:
    before = _system()
    yield
    leaked = _changes(_system, before)
    assert not leaked, f"a test or fixture of this run left behind (before, after): {leaked}"


def _changes(read: Callable[[], dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """Values that differ from ``before``, by name: before and after. Waits up to `PATIENCE` for what is ending."""
    deadline = time.monotonic() + PATIENCE
    while (after := read()) != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
    return {name: (before.get(name), after.get(name)) for name in before | after if before.get(name) != after.get(name)}


def _state() -> dict[str, Any]:
    state: dict[str, Any] = {f"${name}": value for name, value in os.environ.items() if name not in STANDING}
    threads = (thread.name for thread in threading.enumerate() if thread.name not in STANDING_THREADS)
    state |= {f"thread {name!r}": True for name in threads}
    distributed = sys.modules.get("torch.distributed")
    state["process group"] = bool(distributed and distributed.is_available() and distributed.is_initialized())
    state["working directory"] = os.getcwd()
    return state


def _system() -> dict[str, Any]:
    return _children() | _sockets()


def _children() -> dict[str, str]:
    running = {}
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if not any(name in command for name in STANDING_CHILDREN):
                running[f"process {pid}"] = command
    return running


def _sockets() -> dict[str, str]:
    sockets = {}
    for descriptor in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        if target.startswith("socket:"):
            sockets[target] = "open"
    return sockets
