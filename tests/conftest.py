"""The wheels, and the environments in which each is alone; `nox -s wheels` makes them."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest


@dataclass(frozen=True, kw_only=True)
class Installed:
    """One of our wheels, in an environment of its own with what it declares, and the extra if there is one."""

    requirement: str
    sources: Path
    wheel: Path
    python: Path

    def files(self) -> dict[str, bytes]:
        """What the wheel has, by path."""
        with ZipFile(self.wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def modules(self) -> dict[str, str]:
        """The sources of its modules, by their full names."""
        sources = {path: text.decode() for path, text in self.files().items() if path.endswith(".py")}
        return {
            path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): it for path, it in sources.items()
        }

    def run(self, code: str, *arguments: str) -> str:
        """Run ``code`` there; the last line that it prints. (DeepSpeed speaks when it is imported.)"""
        command = [self.python, "-I", "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip().rpartition("\n")[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wheels", type=Path, help="JSON: requirement -> {sources, wheel, python}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``package``: one of each, alone; ``complete``: with its extra, if it has one; ``installed``: all of these."""
    found = list(_all(metafunc.config).values())
    choices = {
        "package": [it for it in found if "[" not in it.requirement],
        "complete": list({it.sources: it for it in found}.values()),
        "installed": found,
    }
    for argument, chosen in choices.items():
        if argument in metafunc.fixturenames:
            names = [it.requirement.removeprefix("lightrft-") for it in chosen]
            metafunc.parametrize(argument, chosen, ids=names)


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> Callable[[str], Installed]:
    """The environment of a requirement."""
    return _all(request.config).__getitem__


def _all(config: pytest.Config) -> dict[str, Installed]:
    path = config.getoption("--wheels")
    if path is None:
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {
        requirement: Installed(requirement=requirement, **{what: Path(path) for what, path in where.items()})
        for requirement, where in found.items()
    }
