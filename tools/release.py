"""What a release uploads. A tag NAME-vVERSION, such as lightrft-fsdp-v0.2.0, releases one package."""

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nox
from nox.project import load_toml

from tools.projects import FOLDERS, ROOT
from tools.wheels import distributions

DIST = ROOT / "dist"
"""Where `nox -s build` puts the source distributions and wheels."""
NOTES = ROOT / ".nox/release-notes.md"
"""What the release page says: the package's changes."""
UNPUBLISHED = "not on PyPI yet"
"""What READMEs say until a package is published; a release needs a README without it."""


class ReleaseError(Exception):
    """A tag that cannot be released."""


@dataclass(frozen=True)
class Release:
    """A package at a version."""

    name: str
    version: str
    notes: str
    """The section of the changelog."""


def read_release(tag: str, folders: Mapping[str, Path] = FOLDERS) -> Release:
    """Return what ``tag`` releases.

    Raises:
        ReleaseError: The tag names no package, or the package's version, changelog or README does not fit.
    """
    name, _, version = tag.rpartition("-v")
    if name not in folders:
        raise ReleaseError(f"{tag}: expected a tag NAME-vVERSION, with NAME one of {', '.join(folders)}")
    declared = load_toml(folders[name] / "pyproject.toml")["project"]["version"]
    if version != declared:
        raise ReleaseError(
            f"{tag}: expected version {declared}, that of {name}'s pyproject.toml. Tag {name}-v{declared}"
        )
    changes = (folders[name] / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)[^\n]*\n+(.*?)\s*(?=^## |\Z)", changes, re.DOTALL | re.MULTILINE)
    if newest is None or newest[1] != version or not newest[2]:
        heading = newest and newest[1]
        raise ReleaseError(
            f"{tag}: expected {name}'s CHANGELOG.md to begin with the changes of {version}, got {heading}"
        )
    if UNPUBLISHED in (folders[name] / "README.md").read_text(encoding="utf-8"):
        raise ReleaseError(
            f"{tag}: expected a README to publish, got one that says {UNPUBLISHED!r}. Remove the sentence"
        )
    return Release(name, version, newest[2] + "\n")


def collect(session: nox.Session, names: Iterable[str]) -> list[Path]:
    """Fill `DIST` with the source distribution and the wheel of each package; return the files."""
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    return [Path(shutil.copy(path, DIST)) for name in names for path in distributions(session, name)]
