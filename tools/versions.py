"""The pages docs/versions-ENGINE.md: the engine versions with which an adapter is certified, from the reports."""

import json
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.projects import ROOT

ENGLISH = {
    "header": """\
# Versions of {engine}

`nox -s "versions({engine})"` installs each version, runs the rollout clauses against it, and writes this page.
With an unsupported version, the adapter raises when it is built, and names the version.

| versions | torch | clauses that pass | others |
|---|---|---:|---|
""",
    "skipped": "{} need more than one rank",
    "failed": "not certified",
}


def write_versions(engine: str, reports: Mapping[str, Path]) -> None:
    """Write the pages of ``engine``. ``reports``: the report of each certification, by the installed versions."""
    chinese = tomllib.loads((ROOT / "docs/zh.toml").read_text(encoding="utf-8"))["versions"]
    for suffix, texts in (("", ENGLISH), (".zh", chinese)):
        rows = [f"| {installed} | {_row(path, texts)} |" for installed, path in reports.items()]
        page = ROOT / "docs" / f"versions-{engine}{suffix}.md"
        page.write_text(texts["header"].format(engine=engine) + "\n".join(rows) + "\n", encoding="utf-8")


def _row(path: Path, texts: Mapping[str, str]) -> str:
    if not path.is_file():
        return f"| 0 | {texts['failed']}"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    verdicts = Counter(clause["verdict"] for clause in report["clauses"])
    others = [
        f"{clause['id']} {clause['verdict']}"
        for clause in report["clauses"]
        if clause["verdict"] not in ("pass", "skip")
    ]
    others += [texts["skipped"].format(verdicts["skip"])] if verdicts["skip"] else []
    others += [report["unjudged"].splitlines()[0]] if report["unjudged"] else []
    return f"{report['environment']['torch']} | {verdicts['pass']} | {', '.join(others)}"
