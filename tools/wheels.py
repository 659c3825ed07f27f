"""The wheels and source distributions of this repository. A wheel is built from the source distribution."""

import hashlib
from pathlib import Path

import nox

from tools.locks import locked
from tools.projects import FOLDERS, ROOT
from tools.uv import uv

STORE = ROOT / ".nox/wheels"
IGNORED = {"__pycache__", ".hypothesis", ".pytest_cache", "dist", "build"}


def wheel(session: nox.Session, name: str) -> Path:
    """The wheel of package ``name``."""
    return distributions(session, name)[1]


def distributions(session: nox.Session, name: str) -> tuple[Path, Path]:
    """The source distribution and the wheel of package ``name``, built unless there are those of its current files."""
    folder = FOLDERS[name]
    if not (folder / "pyproject.toml").is_file():
        session.error(f"{name}: {folder.relative_to(ROOT)}/pyproject.toml does not exist")
    built = STORE / f"{name}-{_digest(folder)}"
    with locked(built):
        if not list(built.glob("*.whl")):
            uv(session, "build", "--build-constraints", ROOT / "constraints/cpu.txt", "--out-dir", built, folder)
    (source,), (path,) = built.glob("*.tar.gz"), built.glob("*.whl")
    return source, path


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not IGNORED.intersection(path.relative_to(folder).parts):
            digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
