"""Build the documentation site and check it: ``python -m tools.site OUTPUT``; mkdocs.yml describes it.

Zensical builds one project per language. The project of a language gets the pages that are written in it under the names
of the English pages, so that links between pages need not name a language. Headings get the anchors of the English ones.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from html.parser import HTMLParser
from importlib.resources import files
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import griffe
import yaml
from markdown.extensions.toc import slugify, unique

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs"
SOURCES = [*sorted(ROOT.glob("packages/*/src")), ROOT / "conformance/src"]
API = "api"
"""The folder of pages that are generated from docstrings."""
CERTIFICATES = "certificates"
"""The folder of certificates. Its README links to them; the navigation does not."""
CODE_OR_HEADING = re.compile(r"^```.*?^```$|^(#+ [^\n]*)$", re.DOTALL | re.MULTILINE)
LINK_UP = re.compile(r"\]\(((?:\.\./)+[^)#\s]*)")
BROKEN_LINE = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])\n *(?=[\u3000-\u9fff\uff00-\uffef])")
"""A line break between two Chinese characters, which would become a space."""
PUBLIC = [
    "config",
    "strategy",
    "strategy.backend",
    "strategy.engine",
    "strategy.telemetry.trackers",
    "fsdp",
    "deepspeed",
]
"""The modules of lightrft whose names the API reference must have."""
EXTERNAL = ("http", "https", "mailto")


def main() -> int:
    """Build the site in all languages. Return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the site; its contents are replaced")
    output = parser.parse_args().output.absolute()
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    languages = list(settings["extra"]["languages"])
    errors = list(page_errors(settings["nav"], languages))
    shutil.rmtree(output, ignore_errors=True)
    for language in languages if not errors else []:
        folder, site = output / "source" / language, output / "site" / ("" if language == languages[0] else language)
        copy_pages(folder / "docs", language, languages, settings["extra"]["repository"])
        project = project_settings(settings, language)
        (folder / "mkdocs.yml").write_text(yaml.safe_dump(project, allow_unicode=True), encoding="utf-8")
        command = (sys.executable, "-m", "zensical", "build", "--strict", "--config-file", folder / "mkdocs.yml")
        if subprocess.run(command, check=False).returncode:
            errors.append(f"zensical failed for language {language}, see above")
            break
        shutil.move(folder / project["site_dir"], site)
        shutil.copy(str(files("mermaidx") / "assets/mermaid.js"), site / "assets/mermaid.js")
    errors = errors or [*sorted(site_errors(output / "site")), *api_errors(output / "site" / API)]
    print(*errors, sep="\n")
    print(f"{output / 'site' / 'index.html'}: {len(errors)} errors" if not errors else f"{len(errors)} errors")
    return 1 if errors else 0


def page_errors(nav: list[Any], languages: list[str]) -> Iterator[str]:
    """Pages that are not in the navigation, or not in every language, and names in the navigation without a page."""
    suffixes = [f".{language}.md" for language in languages[1:]]
    names = {str(path.relative_to(PAGES)) for path in PAGES.rglob("*.md")}
    pages = {name for name in names if not name.endswith(tuple(suffixes))}
    listed = set(_pages_of(nav))
    unlisted = {name for name in pages - listed if PurePosixPath(name).parts[0] != CERTIFICATES}
    yield from (f"docs/{name}: not in the navigation; add it to nav in mkdocs.yml" for name in sorted(unlisted))
    yield from (f"mkdocs.yml: nav names {name}, but docs has no such page" for name in sorted(listed - pages))
    for name in sorted(pages):
        if PurePosixPath(name).parts[0] not in (API, CERTIFICATES):
            translations = [name.removesuffix(".md") + suffix for suffix in suffixes]
            yield from (f"docs/{page}: missing translation of {name}" for page in translations if page not in names)


def _pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages_of(entry)


def copy_pages(target: Path, language: str, languages: list[str], repository: str) -> None:
    """Copy the pages of ``language``, under the names of the English ones, and all pictures.

    Links to files outside of docs lead to ``repository``.
    """
    suffixes = [f".{other}" for other in languages[1:]]
    for source in sorted(path for path in PAGES.rglob("*") if path.is_file() and path.suffix not in (".py", ".toml")):
        name = source.relative_to(PAGES)
        if {"theme", "tests", "__pycache__"} & set(name.parts) or Path(name.stem).suffix in suffixes:
            continue
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix != ".md":
            shutil.copy(source, copy)
            continue
        text = source.read_text(encoding="utf-8")
        translation = source.with_suffix(f".{language}.md")
        if translation.is_file():
            text = BROKEN_LINE.sub("", with_anchors(translation.read_text(encoding="utf-8"), anchors(text)))
        text = LINK_UP.sub(partial(_outside, source.parent, repository), text)
        copy.write_text(text, encoding="utf-8")


def _outside(folder: Path, repository: str, link: re.Match[str]) -> str:
    target = (folder / link[1]).resolve()
    if target.is_relative_to(PAGES) or not target.exists():
        return link[0]
    kind = "tree" if target.is_dir() else "blob"
    return f"]({repository}/{kind}/main/{target.relative_to(ROOT).as_posix()}"


def anchors(text: str) -> list[str]:
    """The anchors of the headings of an English page."""
    taken: set[str] = set()
    plain = [re.sub(r"[`*]|\]\([^)]*\)", "", heading.lstrip("# ")) for heading in _headings(text)]
    return [unique(slugify(heading, "-"), taken) for heading in plain]


def with_anchors(text: str, names: list[str]) -> str:
    """A page with these anchors at its headings, in order."""
    remaining = iter(names)
    return CODE_OR_HEADING.sub(lambda match: f"{match[1]} {{ #{next(remaining, '')} }}" if match[1] else match[0], text)


def _headings(text: str) -> list[str]:
    return [match[1] for match in CODE_OR_HEADING.finditer(text) if match[1]]


def project_settings(settings: dict[str, Any], language: str) -> dict[str, Any]:
    """The settings of Zensical for one language, whose pages are in the folder docs next to them."""
    languages = settings["extra"]["languages"]
    texts, first = languages[language], language == next(iter(languages))
    to_root = "" if first else "../"
    alternate = [
        {"name": texts["name"], "lang": code, "link": to_root if code == next(iter(languages)) else f"{to_root}{code}/"}
        for code, texts in languages.items()
    ]
    (plugin,) = (plugin["mkdocstrings"] for plugin in settings["plugins"] if "mkdocstrings" in plugin)
    python: dict[str, Any] = plugin["handlers"]["python"] | {"paths": list(map(str, SOURCES))}
    python["options"] |= {"extensions": [str(ROOT / "tools/docstrings.py")]}
    plugins = [plugin for plugin in settings["plugins"] if "mkdocstrings" not in plugin]
    return settings | {
        "site_name": texts.get("site_name", settings["site_name"]),
        "site_description": texts.get("site_description", settings["site_description"]),
        "docs_dir": "docs",
        "site_dir": "site",
        "theme": settings["theme"] | {"language": language, "custom_dir": str(ROOT / settings["theme"]["custom_dir"])},
        "nav": _translated(settings["nav"], texts.get("sections", {})),
        "plugins": [*plugins, {"mkdocstrings": {"handlers": {"python": python}}}],
        "extra": {"generator": False, "alternate": alternate},
    }


def _translated(nav: Any, sections: dict[str, str]) -> Any:
    if isinstance(nav, dict):
        return {sections.get(title, title): _translated(entries, sections) for title, entries in nav.items()}
    return [_translated(entry, sections) for entry in nav] if isinstance(nav, list) else nav


class _Page(HTMLParser):
    """The anchors and the targets of links, pictures, scripts and styles of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what the attributes of a tag name."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if "href" in values:
            (self.loaded if tag == "link" and "icon" not in values.get("rel", "") else self.links).add(values["href"])
        if "src" in values:
            self.loaded.add(values["src"])


def site_errors(site: Path) -> Iterator[str]:
    """Links to pages and anchors that do not exist, and what a page loads from elsewhere."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    if not pages:
        yield f"{site}: expected pages, found none"
    for path, page in pages.items():
        name = path.relative_to(site)
        yield from (f"{name}: loads {url}: not in the site" for url in page.loaded if urlsplit(url).scheme in EXTERNAL)
        for url in page.links | page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{name}: link to {url}: no such file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name}: link to {url}: no such anchor"


def api_errors(pages: Path) -> Iterator[str]:
    """Public names that are not in the API reference, under any name."""
    loader = griffe.GriffeLoader(search_paths=SOURCES)
    package = loader.load("lightrft")
    loader.resolve_aliases()
    shown = set[str]()
    for anchor in chain.from_iterable(_Page(path.read_text(encoding="utf-8")).anchors for path in pages.glob("*.html")):
        with suppress(KeyError, ValueError):
            shown.add(package[anchor.removeprefix("lightrft.")].canonical_path)
    for module in PUBLIC:
        for name in package[module].exports:
            found = package[module][name]
            found = found[name] if found.is_module else found  # a function in a file of its name
            if found.canonical_path not in shown:
                yield f"lightrft.{module}.{name}: public, but not in docs/{API}: name it there, or write its docstring"


if __name__ == "__main__":
    sys.exit(main())
