"""Options for the tests of what a release uploads; `nox -s build` passes them."""

import sys
from pathlib import Path

import pytest
from release_environment import run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests import tools


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dist", type=Path, required=True, help="The folder with what a release uploads")
    parser.addoption(
        "--wheel-folder", type=Path, action="append", default=[], help="Folders with the wheels of all packages"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``source``: each source distribution."""
    if "source" in metafunc.fixturenames:
        metafunc.parametrize("source", _sources(metafunc.config), ids=lambda path: path.name)


@pytest.fixture(scope="session")
def sources(request: pytest.FixtureRequest) -> list[Path]:
    """All source distributions."""
    return _sources(request.config)


@pytest.fixture(scope="session")
def wheels(request: pytest.FixtureRequest) -> list[Path]:
    """The folders with the wheels of all packages."""
    folders: list[Path] = request.config.getoption("--wheel-folder")
    return folders


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A new virtual environment, with pip."""
    run(f"uv venv --seed --python {sys.executable} {tmp_path / 'venv'}")
    return tmp_path / "venv"


def _sources(config: pytest.Config) -> list[Path]:
    sources = sorted(config.getoption("--dist").glob("*.tar.gz"))
    if not sources:
        raise pytest.UsageError(f"--dist: expected source distributions, got none in {config.getoption('--dist')}")
    return sources
