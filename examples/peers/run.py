"""Judges training libraries by the same promises, runs the scripts of differences, and writes docs/peers.json.

`nox -s peers` runs this (``python -m examples.peers.run``), and then makes docs/peers.md from the results. ``--target NAME``
judges only that one, and keeps what docs/peers.json has of the others; ``--promise ID`` does so for one promise. What is not
judged is told as such. A complete run fails if a difference has no entry in differences/documented.toml, so that "no
documentation found" is always a decision.
"""

import argparse
import json
import platform
from importlib.metadata import version
from typing import Any

from examples.peers.judging import judged
from examples.peers.results import COLUMNS, RESULTS, documented, errors, families, notes_of, scripts
from examples.peers.scripts import outputs

PACKAGES = ("torch", "accelerate", "lightning-fabric", "deepspeed", "transformers")


def main() -> None:
    """Judge, run the scripts, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=COLUMNS, default=[])
    parser.add_argument("--promise", action="append", default=[])
    parser.add_argument("--no-scripts", action="store_true", help="keep what docs/peers.json has of the scripts")
    options = parser.parse_args()
    before: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    known = {promise["id"] for family in families().values() for promise in family}
    results = {
        column["name"]: {result["promise"]: result for result in column["results"] if result["promise"] in known}
        for column in before.get("columns", [])
    }
    printed = {name: text for name, text in before.get("outputs", {}).items() if name in scripts()}
    for name in options.target or COLUMNS:
        fresh = {result["promise"]: result for result in judged(name, options.promise)}
        results[name] = (results.get(name, {}) if options.promise else {}) | fresh
        write(results, printed)
    if not options.no_scripts:
        for script, text in outputs(scripts()):
            printed[script] = text
            write(results, printed)
    found = list(errors(write(results, printed)))
    print(*found, sep="\n")
    if found and not (options.target or options.promise or options.no_scripts):
        raise SystemExit(1)


def write(results: dict[str, dict[str, dict[str, str]]], printed: dict[str, str]) -> dict[str, Any]:
    """Write docs/peers.json, with all columns; what is not judged has no results."""
    notes = documented()
    content = {
        "versions": {name: version(name).partition("+")[0] for name in PACKAGES} | {"Python": platform.python_version()},
        "families": families(),
        "columns": [
            {
                "name": name, "library": column.library, "strategy": column.strategy, "world": column.world,
                "results": list(results.get(name, {}).values()),
            }
            for name, column in COLUMNS.items()
        ],
        "notes": {name: notes_of(name, notes) for name in COLUMNS},
        "outputs": printed,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return content


if __name__ == "__main__":
    main()
