"""One closing line for a whole run of nox, in the form of pytest's, which people and machines know how to read.

It counts every test of every pytest run, every clause of every certification, and every session that is neither (a
linter, a script) as one. A session that failed although nothing in it was counted as failed is one error.
"""

import atexit
import functools
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import nox

from tools.projects import ROOT

STORE = ROOT / ".nox/reports"
ORDER = ("failed", "passed", "skipped", "xfailed", "error")
VERDICTS = {"pass": "passed", "fail": "failed", "hang": "failed", "skip": "skipped", "xfail": "xfailed"}

_totals: Counter[str] = Counter()
_began = time.monotonic()


def report(session: nox.Session, suffix: str) -> Path:
    """A new file in which a session reports: pytest ``.xml``, a certification ``.json``, anything else as it likes."""
    reports = _reports(session)
    return reports / f"{len(list(reports.iterdir()))}{suffix}"


def skip(session: nox.Session, why: str) -> NoReturn:
    """End a session that cannot run here."""
    report(session, ".skipped").write_text(why, encoding="utf-8")
    session.skip(why)


def counted(function: Callable[..., None]) -> Callable[..., None]:
    """Make a session count in the closing line."""

    @functools.wraps(function)
    def run(session: nox.Session, *arguments: Any, **named: Any) -> None:
        if not _totals:
            atexit.register(_close)
        reports = _reports(session)
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir(parents=True)
        succeeded = False
        try:
            function(session, *arguments, **named)
            succeeded = True
        finally:
            _totals.update(_outcomes(reports, succeeded))

    return run


def _reports(session: nox.Session) -> Path:
    return STORE / re.sub(r"[^\w.=-]+", "-", session.name).strip("-")


def _outcomes(reports: Path, succeeded: bool) -> Counter[str]:
    found: Counter[str] = Counter()
    for path in reports.glob("*.xml"):
        found.update(map(_of_test, ElementTree.parse(path).iter("testcase")))
    for path in reports.glob("*.json"):
        found.update(map(_of_clause, json.loads(path.read_text("utf-8"))["clauses"]))
    if list(reports.glob("*.skipped")):
        found["skipped"] += 1
    elif succeeded and not found:
        found["passed"] += 1
    elif not succeeded and not found["failed"] and not found["error"]:
        found["error"] += 1
    return found


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


def _close() -> None:
    counts = ", ".join(_words(_totals[outcome], outcome) for outcome in ORDER if _totals[outcome])
    print(f" {counts} in {time.monotonic() - _began:.2f}s ".center(80, "="), flush=True)


def _words(count: int, outcome: str) -> str:
    return f"{count} {outcome}s" if outcome == "error" and count > 1 else f"{count} {outcome}"
