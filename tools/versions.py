"""The pages docs/versions-ENGINE.md: which versions of an engine its adapter was certified with, from the reports."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.projects import ROOT

HEADER = """\
# Versions of {engine}

Each was installed, and the clauses about rollouts were run against it: `nox -s "versions({engine})"`, which made this page.
What the adapter cannot drive it refuses when it is built, with the version that it found.

| versions | torch | clauses that hold | others |
|---|---|---:|---|
"""


def write_versions(engine: str, reports: Mapping[str, Path]) -> None:
    """Write the page of ``engine``. ``reports``: those of its certifications, by what was installed."""
    rows = [f"| {installed} | {_row(path)} |" for installed, path in reports.items()]
    page = ROOT / "docs" / f"versions-{engine}.md"
    page.write_text(HEADER.format(engine=engine) + "\n".join(rows) + "\n", encoding="utf-8")


def _row(path: Path) -> str:
    if not path.is_file():
        return "| 0 | could not be judged"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    verdicts = Counter(clause["verdict"] for clause in report["clauses"])
    others = [
        f"{clause['id']} {clause['verdict']}"
        for clause in report["clauses"]
        if clause["verdict"] not in ("pass", "skip")
    ]
    others += [f"{verdicts['skip']} say nothing at world size 1"] if verdicts["skip"] else []
    others += [report["unjudged"].splitlines()[0]] if report["unjudged"] else []
    return f"{report['environment']['torch']} | {verdicts['pass']} | {', '.join(others)}"
