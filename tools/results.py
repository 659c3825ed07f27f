"""The summary of a run of nox: a line for each session, and one closing line in the form of pytest's.

The closing line counts every test of every pytest run, every clause of every certification, and every session that is
neither (a linter, a script) as one. A session that fails without a failed test or clause counts as one error.

Sessions may run in separate processes, several at a time: each writes its result into a folder of the run, which the
process that began the run reads when it ends.
"""

import atexit
import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import nox

from tools.projects import ROOT

STORE = ROOT / ".nox/reports"
RUN = "LIGHTRFT_NOX_RUN"
"""The environment variable that names the folder of the run."""
ORDER = ("failed", "passed", "skipped", "xfailed", "error")
VERDICTS = {"pass": "passed", "fail": "failed", "hang": "failed", "skip": "skipped", "xfail": "xfailed"}


def begin_run() -> None:
    """Make the folder of the run, unless a parent process did, and print the summary when this process ends."""
    if RUN not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="lightrft-nox-"))
        os.environ[RUN] = str(folder)
        atexit.register(_close, folder, time.monotonic(), _processor_seconds())


def report(session: nox.Session, suffix: str) -> Path:
    """A new file for a report of the session: ``.xml`` from pytest, ``.json`` from a certification, or any other."""
    reports = _reports(session)
    return reports / f"{len(list(reports.iterdir()))}{suffix}"


def skip(session: nox.Session, why: str) -> NoReturn:
    """End a session that cannot run here."""
    report(session, ".skipped").write_text(why, encoding="utf-8")
    session.skip(why)


def counted(function: Callable[..., None]) -> Callable[..., None]:
    """Make a session count in the summary."""

    @functools.wraps(function)
    def run(session: nox.Session, *arguments: Any, **named: Any) -> None:
        reports = _reports(session)
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir(parents=True)
        start = time.monotonic()
        _record(session, Counter(error=1), 0.0)  # remains if this process is killed
        succeeded = False
        try:
            function(session, *arguments, **named)
            succeeded = True
        finally:
            _record(session, _outcomes(reports, succeeded), time.monotonic() - start)

    return run


def _reports(session: nox.Session) -> Path:
    return STORE / _file_name(session)


def _file_name(session: nox.Session) -> str:
    return re.sub(r"[^\w.=-]+", "-", session.name).strip("-")


def _record(session: nox.Session, outcomes: Counter[str], seconds: float) -> None:
    result = {"session": session.name, "outcomes": outcomes, "seconds": seconds}
    (Path(os.environ[RUN]) / _file_name(session)).write_text(json.dumps(result), encoding="utf-8")


def _outcomes(reports: Path, succeeded: bool) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for path in reports.glob("*.xml"):
        outcomes.update(map(_of_test, ElementTree.parse(path).iter("testcase")))
    for path in reports.glob("*.json"):
        outcomes.update(map(_of_clause, json.loads(path.read_text("utf-8"))["clauses"]))
    if list(reports.glob("*.skipped")):
        outcomes["skipped"] += 1
    elif succeeded and not outcomes:
        outcomes["passed"] += 1
    elif not succeeded and not outcomes["failed"] and not outcomes["error"]:
        outcomes["error"] += 1
    return outcomes


def _of_test(case: ElementTree.Element) -> str:
    if case.find("failure") is not None:
        return "failed"
    if case.find("error") is not None:
        return "error"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"


def _of_clause(clause: dict[str, Any]) -> str:
    outcome = VERDICTS.get(clause["verdict"], "error")
    return "xfailed" if outcome == "failed" and clause["level"] == "SHOULD" else outcome


def _close(folder: Path, start: float, processor_start: float) -> None:
    results = [json.loads(path.read_text("utf-8")) for path in folder.iterdir()]
    shutil.rmtree(folder)
    if not results:
        return
    seconds = time.monotonic() - start
    if len(results) > 1:
        for result in sorted(results, key=lambda result: -result["seconds"]):
            print(f"{result['seconds']:7.0f} s  {result['session']}: {_words(result['outcomes'])}")
        print(f"{seconds:7.0f} s  all; {_processor_seconds() - processor_start:.0f} s of this machine's processor time")
    totals = sum((Counter(result["outcomes"]) for result in results), Counter[str]())
    print(f" {_words(totals)} in {seconds:.2f}s ".center(80, "="), flush=True)


def _processor_seconds() -> float:
    """CPU time that this machine has spent since it started, in all processes; 0 if the system does not report it."""
    counters = Path("/proc/stat")
    if not counters.is_file():
        return 0.0
    user, nice, system, _, _, interrupts, soft_interrupts = map(int, counters.read_text("ascii").split()[1:8])
    return (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK")


def _words(outcomes: Mapping[str, int]) -> str:
    return ", ".join(_count(outcomes[outcome], outcome) for outcome in ORDER if outcomes.get(outcome))


def _count(count: int, outcome: str) -> str:
    return f"{count} {outcome}s" if outcome == "error" and count > 1 else f"{count} {outcome}"
