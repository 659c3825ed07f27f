"""The files that a release uploads: complete, and installable by name."""

import tarfile
from pathlib import Path
from zipfile import ZipFile

from release_environment import ROOT, run
from tools.projects import FOLDERS

ADDED = {"PKG-INFO", ".gitignore"}
"""Files that hatchling adds to a source distribution."""


def project(source: Path) -> str:
    return source.name.rpartition("-")[0].replace("_", "-")


def version(source: Path) -> str:
    return source.name.removesuffix(".tar.gz").rpartition("-")[2]


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_source_distribution_holds_the_tracked_files(source):
    with tarfile.open(source) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    folder = FOLDERS[project(source)]
    tracked = run("git ls-files --cached --others --exclude-standard", cwd=folder).splitlines()
    assert packed - ADDED == {name for name in tracked if (folder / name).is_file()}
    assert {"PKG-INFO", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= packed
    assert any(name.endswith("/py.typed") for name in packed)


def test_a_source_distribution_and_the_sources_give_the_same_wheel(source, tmp_path):
    run(
        f"uv build -q --wheel --build-constraints {ROOT}/constraints/cpu.txt --out-dir {tmp_path} {FOLDERS[project(source)]}"
    )
    (of_sources,) = tmp_path.glob("*.whl")
    (released,) = source.parent.glob(f"{of_sources.name}")
    assert contents(of_sources) == contents(released)


def test_what_was_built_installs_by_name_in_a_new_environment(sources, wheels, venv):
    names = sorted(map(project, sources))
    run(f"uv pip install {' '.join(f'--find-links {folder}' for folder in wheels)} {' '.join(names)}", venv=venv)
    run("uv pip check", venv=venv)
    installed = dict(line.split("==") for line in run("pip list --format=freeze", venv=venv).splitlines())
    assert {name: installed.get(name) for name in names} == {project(path): version(path) for path in sources}
    for name in names:
        run(f"python -c 'import lightrft.{name.split('-')[1]}'", cwd=venv, venv=venv)
