"""The site's builder finds what is wrong with pages and links."""

from pathlib import Path

import pytest
from tools import site


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A folder docs with two pages, of which one is translated."""
    docs = tmp_path / "docs"
    for name in ("api", "certificates"):
        (docs / name).mkdir(parents=True)
    for name in ("index.md", "index.zh.md", "guide.md", "api/index.md", "certificates/fsdp.md"):
        (docs / name).write_text("# Title\n", encoding="utf-8")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "PAGES", docs)
    return docs


def test_pages_must_be_in_the_navigation_and_translated(pages):
    errors = list(site.page_errors(["index.md", {"More": ["missing.md", "api/index.md"]}], ["en", "zh"]))
    assert [error.partition(";")[0] for error in errors] == [
        "docs/guide.md: not in the navigation",
        "mkdocs.yml: nav names missing.md, but docs has no such page",
        "docs/guide.zh.md: missing translation of guide.md",
    ]


def test_a_translation_has_the_anchors_of_the_english_page(pages):
    (pages / "guide.md").write_text(
        "# A `b` (c)\n\n```sh\n# no heading\n```\n\n## [Link](x.md)\n\n## Link\n", encoding="utf-8"
    )
    (pages / "build.py").touch()
    (pages / "guide.zh.md").write_text("# 甲\n\n```sh\n# no heading\n```\n\n## 乙。\n丙\n\n## 丁\n", encoding="utf-8")
    site.copy_pages(pages.parent / "zh", "zh", ["en", "zh"], "https://example.org")
    text = (pages.parent / "zh/guide.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in (pages.parent / "zh").glob("*.*")) == ["guide.md", "index.md"]
    assert text == "# 甲 { #a-b-c }\n\n```sh\n# no heading\n```\n\n## 乙。 { #link }\n丙\n\n## 丁 { #link_1 }\n"


def test_lines_of_chinese_are_joined_and_links_to_sources_lead_to_the_repository(pages):
    (pages.parent / "LICENSE").touch()
    (pages / "guide.zh.md").write_text(
        "# 甲\n\n一行。\n又一行 and\n[许可](../LICENSE)、[无](../NONE)\n", encoding="utf-8"
    )
    site.copy_pages(pages.parent / "zh", "zh", ["en", "zh"], "https://example.org")
    text = (pages.parent / "zh/guide.md").read_text(encoding="utf-8")
    assert "一行。又一行 and\n[许可](https://example.org/blob/main/LICENSE)、[无](../NONE)" in text


def test_links_and_what_pages_load_are_checked(tmp_path: Path):
    (tmp_path / "other.html").write_text('<h2 id="there">', encoding="utf-8")
    (tmp_path / "index.html").write_text(
        """
        <a href="other.html#there"> <a href="other.html#gone"> <a href="gone.html"> <a href="#gone">
        <a href="https://example.org"> <a href="mailto:me@example.org"> <img src="gone.png">
        <script src="https://example.org/x.js"></script> <link rel="stylesheet" href="https://example.org/x.css">
        """,
        encoding="utf-8",
    )
    assert sorted(site.site_errors(tmp_path)) == [
        "index.html: link to #gone: no such anchor",
        "index.html: link to gone.html: no such file",
        "index.html: link to gone.png: no such file",
        "index.html: link to other.html#gone: no such anchor",
        "index.html: loads https://example.org/x.css: not in the site",
        "index.html: loads https://example.org/x.js: not in the site",
    ]


def test_a_site_without_pages_is_an_error(tmp_path: Path):
    assert list(site.site_errors(tmp_path)) == [f"{tmp_path}: expected pages, found none"]
