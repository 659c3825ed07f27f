"""The install commands of the pages, run against a clone of this repository, each in a new environment."""

import re
import shutil
import subprocess

import pages
import pytest
from nox.project import load_toml
from release_environment import ROOT, run

REPOSITORY = load_toml(ROOT / "pyproject.toml")["project"]["urls"]["Repository"]
USE = """
from lightrft.strategy import get_strategy
with get_strategy({"strategy": "fsdp", "bf16": False}) as strategy:
    print(type(strategy).__name__)
"""


def commands(page: str) -> list[str]:
    """The blocks of a page that install lightrft-fsdp, without those that need more than this machine has."""
    return [
        block.text
        for block in pages.blocks((ROOT / page).read_text(encoding="utf-8"))
        if "pip install" in block.text and "lightrft-fsdp" in block.text and "needs" not in block.comment
    ]


@pytest.fixture(scope="session")
def mirror(tmp_path_factory):
    """Variables that make git read a copy of the working tree instead of the URL of the repository."""
    tree, bare = (tmp_path_factory.mktemp("mirror") / name for name in ("tree", "repository.git"))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # else it was deleted
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    identity = "-c user.name=tests -c user.email=tests@localhost"
    run(f"git init -q --initial-branch main && git add . && git {identity} commit -q -m 'The working tree'", cwd=tree)
    run(f"git clone -q --bare {tree} {bare}")
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{bare}.insteadOf",
        "GIT_CONFIG_VALUE_0": REPOSITORY,
    }


@pytest.mark.parametrize(
    "way",
    [
        "pip install ./packages",
        "uv pip install ./packages",
        'uv pip install "lightrft-fsdp @',
        'pip install "lightrft-config @',
    ],
)
def test_the_page_shows_each_way_to_install(way):
    assert [block for block in commands("docs/install.md") if re.search(f"^{re.escape(way)}", block, re.MULTILINE)]


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_a_readme_shows_commands_of_the_page(page):
    shown = commands(page)
    assert [block.split()[0] for block in shown] == ["uv", "pip"]
    assert [block for block in shown if not any(block in other for other in commands("docs/install.md"))] == []


@pytest.mark.parametrize("command", commands("docs/install.md"))
def test_an_install_command_works(command, venv, mirror, tmp_path):
    run("uv pip install torch", venv=venv)  # pip alone would take longer
    run(command, cwd=tmp_path, venv=venv, **mirror)
    assert run(f"python -c '{USE}'", cwd=venv, venv=venv).split() == ["FSDPV2Strategy"]


def test_the_packages_of_the_cpu_image_install(venv, mirror, tmp_path):
    dockerfile = (ROOT / "examples/launch/Dockerfile.cpu").read_text(encoding="utf-8")
    (command,) = re.findall(r"^RUN uv venv \S+ && (uv pip install (?:\\\n|[^\n])*)$", dockerfile, re.MULTILINE)
    run(f"git clone -q {REPOSITORY} clone", cwd=tmp_path, **mirror)
    run(command, cwd=tmp_path / "clone", venv=venv)
    assert "lightrft-deepspeed" in run("lightrft --version", venv=venv)
