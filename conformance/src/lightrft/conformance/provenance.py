"""The origin of the code under test and the environment of a run, for reports."""

import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, entry_points, version
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

GROUPS = ("lightrft.strategies", "lightrft.engines")


def origin_of(name: str, cls: type) -> dict[str, object]:
    """The origin of ``cls``, which was requested as ``name``.

    Returns:
        The distribution that declares an entry point for the class or owns its file, with version and requirements; for
        code without a distribution, a digest of its file.
    """
    owner = _by_entry_point(name, cls) or _by_file(_file_of(cls))
    if owner is None:
        return {"distribution": "", "version": "", "source": _digest(_file_of(cls))}
    return {
        "distribution": owner.metadata["Name"],
        "version": owner.version,
        "requirements": _requirements(owner),
    }


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


def _digest(file: Path | None) -> str:
    if file is None or not file.is_file():
        return ""
    return f"{file.name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
