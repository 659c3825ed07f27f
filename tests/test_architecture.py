"""docs/architecture.md names files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STRATEGY = ROOT / "packages/lightrft-strategy-base/src/lightrft/strategy"
NAMED = sorted(set(re.findall(r"`([\w/-]+\.py)`", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"))))


def test_the_page_names_files():
    assert len(NAMED) > 20


@pytest.mark.parametrize("name", [name for name in NAMED if name != "patches.py"])
def test_a_file_that_the_page_names_exists(name):
    assert (STRATEGY / name).is_file()
