"""The scripts in peers/differences stand alone: short, without a line of this project, and each is listed with its command."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "peers/differences"
SCRIPTS = sorted(FOLDER.glob("*.py"))
DOCS = Path(__file__).parents[2] / "docs"
MAX_LINES = 30
ALLOWED_IMPORTS = {
    "accelerate", "datetime", "lightning_fabric", "os", "pathlib", "pickle", "resource", "signal", "tempfile", "threading", "time",
    "torch",
}  # fmt: skip


def listed_differences() -> dict[str, dict[str, str]]:
    tables = tomllib.loads((FOLDER / "documented.toml").read_text(encoding="utf-8"))
    return {f"{target}.{name}": entry for target, names in tables.items() for name, entry in names.items()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_needs_only_the_library_that_it_shows(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").partition(".")[0])
    assert len(text.splitlines()) <= MAX_LINES
    assert imported <= ALLOWED_IMPORTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_how_it_is_run_and_prints_what_was_expected_and_what_it_got(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    command = (ast.get_docstring(ast.parse(text)) or "").splitlines()[-1].strip()
    assert command in (f"python {script.name}", f"torchrun --standalone --nproc-per-node 2 {script.name}")
    printed = re.findall(r"(?:\"|\\n)(expected: |got:      )", text)
    assert sorted(printed) == ["expected: ", "got:      "]


def test_each_script_is_listed_and_each_listed_script_exists() -> None:
    listed = {entry["script"] for entry in listed_differences().values() if "script" in entry}
    assert listed == {script.name for script in SCRIPTS}


def test_an_entry_has_known_keys_and_links() -> None:
    for name, entry in listed_differences().items():
        assert entry.keys() <= {"script", "link", "issue", "note", "note_zh"}, name
        assert ("note" in entry) == ("note_zh" in entry), name
        links = [entry[key] for key in ("link", "issue") if key in entry]
        assert all(link.startswith("https://") or link_leads_to_a_heading(link) for link in links), name


def link_leads_to_a_heading(link: str) -> bool:
    page, _, anchor = link.partition("#")
    headings = re.findall(r"^#+ (.+)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]
