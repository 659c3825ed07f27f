"""Where the code under test came from, and what it ran on: what a certificate is about."""

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


def origin_of(name: str, kind: type) -> dict[str, object]:
    """Of the class ``kind``, asked for as ``name``: its distribution with version and requirements, or its source.

    Found by the entry point of that name, else by who owns the file. Code that belongs to no distribution is
    known by a digest of its file.
    """
    found = _by_entry_point(name, kind) or _by_file(_file_of(kind))
    if found is None:
        return {"distribution": "", "version": "", "source": _digest(_file_of(kind))}
    return {
        "distribution": found.metadata["Name"],
        "version": found.version,
        "requirements": _requirements(found),
    }


def version_of(name: str) -> str:
    """The version of a distribution, or an empty string where there is none."""
    try:
        return version(name)
    except (PackageNotFoundError, ValueError):
        return ""


def environment() -> dict[str, str | int]:
    """What a run ran on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": len(os.sched_getaffinity(0)),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "torch": torch.__version__,
        "hypothesis": version_of("hypothesis"),
    }


def _by_entry_point(name: str, kind: type) -> Distribution | None:
    value = f"{kind.__module__}:{kind.__qualname__}"
    points = [point for group in GROUPS for point in entry_points(group=group) if point.value == value]
    points.sort(key=lambda point: point.name != name)
    return points[0].dist if points else None


def _file_of(kind: type) -> Path | None:
    spec = importlib.util.find_spec(kind.__module__) if kind.__module__ != "__main__" else None
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve()


def _by_file(file: Path | None) -> Distribution | None:
    """The distribution that has ``file``, or whose sources, installed as editable, do."""
    if file is None:
        return None
    return next((it for it in distributions() if _owns(it, file)), None)


def _owns(found: Distribution, file: Path) -> bool:
    sources = _editable_sources(found)
    if sources is not None:
        return file.is_relative_to(sources)
    named = (part for part in found.files or () if part.name == file.name)
    return any(Path(str(part.locate())).resolve() == file for part in named)


def _editable_sources(found: Distribution) -> Path | None:
    text = found.read_text("direct_url.json")
    record = json.loads(text) if text else {}
    if not record.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(record["url"]).path)).resolve()


def _requirements(found: Distribution) -> dict[str, str]:
    """The versions of what it requires, extras included, as far as that is installed."""
    names = sorted({re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in found.requires or ()})
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
