"""How many files a reader must open to follow a call; `python tests/shared/call_paths.py` lists them."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from call_paths import call_paths

ARCHITECTURE = Path(__file__).parents[3] / "docs/architecture.md"

LIMITS = {
    "step": 7,
    "save_ckpt": 15,
    "load_ckpt": 18,
    "update_engine_weights": 14,
    "gather_and_generate": 10,
}
"""Most files that each call may pass."""
if version("transformers").startswith("4."):
    LIMITS["update_engine_weights"] += 1  # transformers_4.py


@pytest.fixture(scope="module")
def paths():
    return call_paths()


def test_each_call_is_traced(paths):
    assert paths.keys() == LIMITS.keys()
    assert all(len(files) > 2 for files in paths.values())


@pytest.mark.parametrize("call", LIMITS)
def test_a_call_passes_few_files(paths, call):
    assert len(paths[call]) <= LIMITS[call], "\n".join(["it passes:", *paths[call]])


@pytest.mark.parametrize(("call", "section"), [("step", "One update"), ("save_ckpt", "One checkpoint")])
def test_the_architecture_page_names_the_files_of_a_call(paths, call, section):
    text = ARCHITECTURE.read_text(encoding="utf-8").partition(f"## {section}")[2].partition("## ")[0]
    assert {path.removeprefix("strategy/") for path in paths[call]} <= set(re.findall(r"`([\w/]+\.py)`", text))
