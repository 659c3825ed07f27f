"""Environments on machines with GPUs, whose images may bring torch and engines."""

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import nox
from packaging.requirements import Requirement

from tools.environments import Environment
from tools.projects import closure
from tools.uv import uv


def count_gpus() -> int:
    """The number of NVIDIA GPUs of this machine."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def environment_on_gpus(requirements: tuple[str, ...]) -> Environment:
    """An environment with the torch of this Python if it has one, otherwise with the build that fits the GPUs."""
    if find_spec("torch"):
        return Inherited(requirements, torch=f"{version('torch')} of {sys.prefix}")
    return Environment(requirements, torch="auto")


class Inherited(Environment):
    """The packages of this Python, and our wheels."""

    def _make(self, session: nox.Session, wheels: Mapping[str, Path]) -> None:
        others = map(Requirement, closure(self.requirements)[1])
        missing = [str(requirement) for requirement in others if not _satisfied(requirement)]
        if missing:
            session.error(f"{sys.executable} has torch but lacks {', '.join(missing)}; install these and try again")
        uv(session, "venv", "--clear", "--python", sys.executable, self.folder)
        (site,) = self.folder.glob("lib/python*/site-packages")
        paths = sysconfig.get_paths()
        (site / "inherited.pth").write_text(f"{paths['purelib']}\n{paths['platlib']}\n", encoding="utf-8")
        uv(session, "pip", "install", "--python", self.python, "--no-deps", *wheels.values())


def _satisfied(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False
