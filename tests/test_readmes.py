"""A page in Chinese, NAME.zh.md, has what NAME.md has: headings, code, tables and links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHINESE = [ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.zh.md"))]
COMMENT = re.compile(r"^<!-- .* -->\n", re.MULTILINE)
"""For the test that runs the code of pages in English."""
CODE_BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def heading_levels(text: str) -> list[int]:
    return [len(level) for level in re.findall(r"^(#+) ", CODE_BLOCK.sub("", text), re.MULTILINE)]


def code_blocks(text: str) -> list[str]:
    return CODE_BLOCK.findall(text)


def table_commands(text: str) -> list[list[str]]:
    """The code spans of each table row, sorted: languages order their words differently."""
    return [sorted(re.findall(r"`[^`]+`", row)) for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]


def link_targets(text: str) -> list[str]:
    """What the links and pictures point to, without the link to the other language; "#" for a heading of the same page."""
    targets = re.findall(r"\]\(([^)]+)\)", CODE_BLOCK.sub("", text))
    return sorted(re.sub("^#.*", "#", target) for target in targets if not target.startswith("README"))


def paragraphs_and_items(text: str) -> list[int]:
    """The number of list items in each block of text; 0 for a paragraph."""
    prose = COMMENT.sub("", CODE_BLOCK.sub("", text))
    return [len(re.findall("^- ", block, re.MULTILINE)) for block in re.split(r"\n\n+", prose)]


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.parametrize("part", [heading_levels, code_blocks, table_commands, link_targets, paragraphs_and_items])
def test_a_chinese_page_has_what_the_english_one_has(part, page):
    english = page.with_name(page.name.replace(".zh.md", ".md"))
    expected = part(english.read_text(encoding="utf-8"))
    assert expected or part is not heading_levels, "there is something to compare"
    assert part(page.read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_local_links_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    local = [target for target in link_targets(text) if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_links_to_headings_of_the_page_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = [heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    linked = re.findall(r"\]\(#([^)]+)\)", text)
    assert linked
    assert set(linked) <= set(headings)
