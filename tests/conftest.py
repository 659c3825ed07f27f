"""Fixtures for the tests of wheels: the wheels, each installed alone in an environment; `nox -s wheels` makes them."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A wheel in an environment with its dependencies, and those of an extra if ``requirement`` names one."""

    requirement: str
    sources: Path
    wheel: Path
    python: Path

    def files(self) -> dict[str, bytes]:
        """The contents of the wheel, by path."""
        with ZipFile(self.wheel) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def modules(self) -> dict[str, str]:
        """Sources of the modules in the wheel, by full name."""
        sources = {path: text.decode() for path, text in self.files().items() if path.endswith(".py")}
        names = {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources}
        return {names[path]: source for path, source in sources.items()}

    def run(self, code: str, *arguments: str) -> str:
        """Run ``code`` in the environment; returns the last line of its output. (DeepSpeed prints when it is imported.)"""
        command = [self.python, "-I", "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip().rpartition("\n")[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wheels", type=Path, help="JSON: requirement -> {sources, wheel, python}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``package``: each without extras; ``complete``: each with its extra if it has one; ``installed``: all of these."""
    everything = list(_all(metafunc.config).values())
    choices = {
        "package": [each for each in everything if "[" not in each.requirement],
        "complete": list({each.sources: each for each in everything}.values()),
        "installed": everything,
    }
    for argument, chosen in choices.items():
        if argument in metafunc.fixturenames:
            names = [each.requirement.removeprefix("lightrft-") for each in chosen]
            metafunc.parametrize(argument, chosen, ids=names)


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> Callable[[str], Installed]:
    """Returns the environment of a requirement."""
    return _all(request.config).__getitem__


def _all(config: pytest.Config) -> dict[str, Installed]:
    path = config.getoption("--wheels")
    if path is None:
        return {}
    listing = json.loads(path.read_text(encoding="utf-8"))
    return {
        requirement: Installed(requirement=requirement, **{key: Path(path) for key, path in paths.items()})
        for requirement, paths in listing.items()
    }
