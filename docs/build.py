"""Generate documentation pages from the code: ``python docs/build.py``. ``--check`` only reports outdated pages.

``contract.md`` is generated from the clauses of the conformance suite, ``settings.md`` from the schema of `StrategyConfig`.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from lightrft.config import StrategyConfig
from lightrft.conformance.clause import Clause
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.saboteurs.corpus import saboteurs

FAMILIES = {
    "LIFE": "Lifecycle and process group",
    "LOG": "Logging",
    "COLL": "Collectives",
    "PREP": "Preparing models",
    "DATA": "Data",
    "SP": "Sequence parallelism",
    "OPT": "Gradients and updates",
    "NORM": "Losses over items",
    "BATCH": "Micro-batches by token budget",
    "LOGP": "Log-probabilities",
    "OFF": "Offloading",
    "EMA": "Moving averages",
    "CKPT": "Checkpoints",
    "EXPORT": "Export",
    "ENG": "Rollout engines",
    "SYNC": "Weight sync",
    "GEN": "Generation",
    "ALL": "All together",
}
"""The families of clauses, in the order of the page."""
OWNERS = {
    "strategy": "Read by the strategy",
    "engine": "Read by the rollout engine",
    "trainer": "Read by the trainer",
}
NOTES = {
    "trainer": "The strategy stores these in `strategy.config` and does not use them. `get_strategy` warns once of those that "
    "differ from their defaults.",
}
"""What a group of settings has in common."""


def contract_page() -> str:
    """Every clause, by family."""
    defects = Counter(saboteur.clause for saboteur in saboteurs())
    lines = [
        "# The contract",
        "",
        "What every LightRFT strategy guarantees, on any backend. `python docs/build.py` generates this page from the clauses",
        "that the conformance suite executes.",
        "",
        "A MUST decides the verdict; a SHOULD is only reported. *From* is the smallest world size at which a clause can fail,",
        "with its other requirements. *Defects* is the number of deliberately broken strategies and engines in which the clause",
        "is known to detect the defect. K is the number of micro-batches per update, the attribute `accumulated_gradient`. The",
        "reference is a plain single-process implementation that shares no code with the strategies.",
    ]
    clauses = sorted(CONTRACT, key=lambda clause: (_family_rank(clause), _number(clause)))
    for family, members in groupby(clauses, _family):
        lines += [
            "",
            f"## {FAMILIES[family]}",
            "",
            "| id | level | from | guarantee | defects |",
            "|---|---|---|---|---:|",
        ]
        lines += [_clause_row(clause, defects[clause.id]) for clause in members]
    return "\n".join(lines) + "\n"


def _family(clause: Clause) -> str:
    return clause.id.partition("-")[0]


def _family_rank(clause: Clause) -> int:
    return list(FAMILIES).index(_family(clause))


def _number(clause: Clause) -> int:
    return int(clause.id.partition("-")[2])


def _clause_row(clause: Clause, defects: int) -> str:
    needs = [f"world {clause.smallest_world}", *(["CUDA"] if clause.needs_cuda else [])]
    needs += [f"`{clause.capability}`"] if clause.capability else []
    return _row(clause.id, clause.level, ", ".join(needs), clause.text, str(defects or ""))


def settings_page() -> str:
    """The page of settings, grouped by the component that reads them."""
    properties = StrategyConfig.json_schema()["properties"]
    lines = [
        "# Settings",
        "",
        "The fields of `StrategyConfig`. `python docs/build.py` generates this page from the schema.",
        "",
        "No setting is ignored silently: a setting that the chosen strategy does not support is an error, or a warning if",
        "the settings come from a script's arguments (`StrategyConfig.from_args`). Settings of other backends are exempt.",
        "",
        "Values are stored exactly or rejected. A float setting also accepts an integer, if a float holds it exactly.",
    ]
    for owner, title in OWNERS.items():
        lines += ["", f"## {title}", *(["", NOTES[owner]] if owner in NOTES else [])]
        lines += ["", "| setting | type | default | meaning |", "|---|---|---|---|"]
        lines += [_setting_row(name, field) for name, field in properties.items() if field.get("owner") == owner]
    return "\n".join(lines) + "\n"


def _setting_row(name: str, field: dict[str, Any]) -> str:
    meaning = field.get("description", "").replace("``", "`")
    backend = f" Only for `{field['backend']}`." if "backend" in field else ""
    return _row(f"`{name}`", _type_of(field), f"`{field.get('default')!r}`", meaning + backend)


def _type_of(field: dict[str, Any]) -> str:
    """Describe the type and the range of a field."""
    if "anyOf" in field:
        return " or ".join(_type_of(option) for option in field["anyOf"])
    if "enum" in field:
        return " or ".join(f"`{value!r}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']!r}`"
    words = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "null": "None", "array": "list"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    ranges = [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
    return " ".join([words.get(field.get("type", ""), field.get("type", "any")), ", ".join(ranges)]).strip()


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


PAGES = {"contract.md": contract_page, "settings.md": settings_page}


def outdated(folder: Path) -> list[str]:
    """Return the pages in ``folder`` that are outdated."""
    return [name for name, make in PAGES.items() if _read(folder / name) != make()]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def main(arguments: Iterable[str] | None = None) -> int:
    """Write the pages, or return 1 if ``--check`` found an outdated one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not up to date")
    options = parser.parse_args(None if arguments is None else list(arguments))
    folder = Path(__file__).parent
    if options.check:
        old = outdated(folder)
        print(f"not up to date: {', '.join(old)}; run python docs/build.py" if old else "up to date")
        return 1 if old else 0
    for name, make in PAGES.items():
        (folder / name).write_text(make(), encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
