"""The origin of the code under test and the environment of a run, for reports."""

import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, entry_points, version
from pathlib import Path
from pkgutil import resolve_name
from urllib.parse import unquote, urlparse

import torch

from lightrft.config import StrategyConfig

GROUPS = ("lightrft.strategies", "lightrft.engines")


def origin_of(name: str, cls: type) -> dict[str, object]:
    """The origin of ``cls``, which was requested as ``name``.

    Returns:
        A digest of its code, and the distribution that declares an entry point for the class or owns its file, with
        version and requirements; for code without a distribution, the name and digest of its file.
    """
    owner = _by_entry_point(name, cls) or _by_file(_file_of(cls))
    digest = digest_of(cls)
    if owner is None:
        return {"digest": digest, "distribution": "", "version": "", "source": _digest(_file_of(cls))}
    return {
        "digest": digest,
        "distribution": owner.metadata["Name"],
        "version": owner.version,
        "requirements": _requirements(owner),
    }


def digest_of(cls: type) -> str:
    """A digest of the code of a strategy or an engine, its base classes and the settings."""
    return digest_of_code([*cls.__mro__, StrategyConfig])


def class_of(name: str) -> type:
    """Import a class by its full name. Raises ImportError if that is impossible, whatever its module raises."""
    remedy = "Install the package that contains it"
    try:
        found = resolve_name(name)
    except (Exception, SystemExit) as error:  # its code is not ours
        raise ImportError(f"expected to import the class {name!r}, got {error!r}. {remedy}") from error
    if not isinstance(found, type):
        raise ImportError(f"expected a class at {name!r}, got {found!r}. {remedy}")
    return found


def digest_of_code(classes: Iterable[type]) -> str:
    """A digest of the Python files of the packages that contain ``classes``, without those of the standard library.

    It depends on the names and the contents of the files, not on where or how the packages are installed.
    """
    files = [_file_of(cls) for cls in classes if cls.__module__.partition(".")[0] not in sys.stdlib_module_names]
    roots = {_package_of(file) for file in files if file is not None}
    return _digest_of_files(
        {f"{root.name}/{file.relative_to(root)}": file for root in roots for file in _sources(root)}
    )


def digest_of_suite() -> str:
    """A digest of the Python files of this suite."""
    root = Path(__file__).parent
    return _digest_of_files({str(file.relative_to(root)): file for file in _sources(root)})


def version_of(name: str) -> str:
    """The version of an installed distribution, or an empty string."""
    try:
        return version(name)
    except (PackageNotFoundError, ValueError):
        return ""


def environment() -> dict[str, str | int]:
    """The environment of a run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": len(os.sched_getaffinity(0)),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "torch": torch.__version__,
        "hypothesis": version_of("hypothesis"),
    }


def _by_entry_point(name: str, cls: type) -> Distribution | None:
    value = f"{cls.__module__}:{cls.__qualname__}"
    points = [point for group in GROUPS for point in entry_points(group=group) if point.value == value]
    points.sort(key=lambda point: point.name != name)
    return points[0].dist if points else None


def _file_of(cls: type) -> Path | None:
    spec = importlib.util.find_spec(cls.__module__) if cls.__module__ != "__main__" else None
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve()


def _by_file(file: Path | None) -> Distribution | None:
    """The distribution that contains ``file``, also if it is installed as editable."""
    if file is None:
        return None
    return next((installed for installed in distributions() if _owns(installed, file)), None)


def _owns(owner: Distribution, file: Path) -> bool:
    sources = _editable_sources(owner)
    if sources is not None:
        return file.is_relative_to(sources)
    named = (part for part in owner.files or () if part.name == file.name)
    return any(Path(str(part.locate())).resolve() == file for part in named)


def _editable_sources(owner: Distribution) -> Path | None:
    text = owner.read_text("direct_url.json")
    record = json.loads(text) if text else {}
    if not record.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(record["url"]).path)).resolve()


def _requirements(owner: Distribution) -> dict[str, str]:
    """The versions of the installed requirements, including those of extras."""
    names = sorted({re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in owner.requires or ()})
    return {name: version_of(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _package_of(file: Path) -> Path:
    """The outermost package of ``file``, or the file itself. A namespace, such as ``lightrft``, is not a package."""
    root = file
    while (root.parent / "__init__.py").is_file():
        root = root.parent
    return root


def _sources(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py")) if root.is_dir() else [root]


def _digest_of_files(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _digest(file: Path | None) -> str:
    if file is None or not file.is_file():
        return ""
    return f"{file.name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
