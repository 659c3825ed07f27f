"""The wheels of this repository, as they would be released: through the source distribution."""

import hashlib
from pathlib import Path

import nox

from tools.projects import FOLDERS, ROOT
from tools.uv import uv

STORE = ROOT / ".nox/wheels"
NO_SOURCE = {"__pycache__", ".hypothesis", ".pytest_cache", "dist", "build"}


def wheel(session: nox.Session, name: str) -> Path:
    """The wheel of package ``name`` as its files are now; built if there is none."""
    folder = FOLDERS[name]
    if not (folder / "pyproject.toml").is_file():
        session.error(f"{name}: there is no {folder.relative_to(ROOT)}/pyproject.toml")
    built = STORE / f"{name}-{_digest(folder)}"
    if not list(built.glob("*.whl")):
        uv(session, "build", "--build-constraints", ROOT / "constraints/cpu.txt", "--out-dir", built, folder)
    (found,) = built.glob("*.whl")
    return found


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not NO_SOURCE.intersection(path.relative_to(folder).parts):
            digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
