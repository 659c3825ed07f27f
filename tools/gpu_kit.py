"""The GPU kit: a folder with our wheels, what they need in addition to a GPU image, the benchmarks, and a script that runs all."""

import email
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.environments import Environment
from tools.pins import PINS
from tools.projects import ROOT, closure
from tools.wheels import wheel

PACKAGES = (
    "lightrft-conformance[transformers]",
    "lightrft-deepspeed",
    "lightrft-engines[transformers]",
    "lightrft-fsdp",
)
IMAGE = ROOT / "gpu_kit/image.txt"
LARGEST = 10 * 10**6
"""Bytes of the whole kit."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def make_kit(session: nox.Session, python: str) -> Path:
    """Make the kit for Python ``python`` ("3.12") of an image as in gpu_kit/image.txt, and print its contents.

    The session fails if the image's versions do not satisfy our packages, or the kit is larger than `LARGEST`.
    """
    folder = ROOT / f".nox/gpu-kit-{python}"
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    ours, others = closure(PACKAGES)
    for name in ours:
        shutil.copy(wheel(session, name), wheels)
    Kit(session, python, wheels).add_missing(others)
    shutil.copy(ROOT / "gpu_kit/run.py", folder)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    sizes = {path.relative_to(folder): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        print(f"{size:9,}  {path}")
    total = sum(sizes.values())
    print(f"{total:9,}  bytes in {folder.relative_to(ROOT)}")
    if total > LARGEST:
        session.error(f"gpu_kit: expected at most {LARGEST:,} bytes, got {total:,}")
    return folder


def rehearse(session: nox.Session) -> None:
    """Make the kit for this Python and run it on the CPU, in a new environment that holds what the image has and no more.

    The versions are those of constraints/cpu.txt. Nothing is fetched once the environment is there.
    """
    kit = make_kit(session, "{}.{}".format(*sys.version_info))
    environment = Environment(tuple(name for name, _ in _versions(IMAGE)))
    shutil.rmtree(environment.folder, ignore_errors=True)
    environment.prepare(session)
    try:
        output = f"--output={kit / 'results'}"
        environment.run(session, "python", kit / "run.py", "--device=cpu", output, *session.posargs, PIP_NO_INDEX="1")
    finally:
        shutil.rmtree(environment.folder, ignore_errors=True)  # the kit has installed into it


class Kit:
    """The third-party wheels of a kit."""

    def __init__(self, session: nox.Session, python: str, folder: Path) -> None:
        self.session, self.python, self.folder = session, python, folder
        self.image, self.pins = dict(_versions(IMAGE)), dict(_versions(PINS))
        self.pip = Environment(("pip", "setuptools", "wheel"))
        self.pip.prepare(session)

    def add_missing(self, requirements: list[str]) -> None:
        """Add a wheel for each requirement that the image lacks, and for what these wheels require in turn."""
        added: set[str] = set()
        pending = list(map(Requirement, requirements))
        while pending:
            requirement = pending.pop()
            name = canonicalize_name(requirement.name)
            if not self._applies(requirement) or name in added:
                continue
            if name in self.image:
                self._check(requirement, self.image[name])
                continue
            if not self.pins.get(name):
                self.session.error(
                    f"gpu_kit: {requirement} is neither in {IMAGE.name} nor in {PINS.name}; add it to one of them"
                )
            added.add(name)
            pending.extend(_required_by(self._fetch(f"{name}=={self.pins[name]}")))

    def _applies(self, requirement: Requirement) -> bool:
        """Whether the requirement's marker holds on the image."""
        target = {"python_version": self.python, "python_full_version": f"{self.python}.0", "extra": ""}
        return requirement.marker is None or requirement.marker.evaluate(target)

    def _check(self, requirement: Requirement, version: str) -> None:
        if version and not requirement.specifier.contains(Version(version), prereleases=True):
            self.session.error(f"gpu_kit: expected {requirement}, got {version} in {IMAGE.name}")

    def _fetch(self, requirement: str) -> Path:
        """The wheel for the image; built here from source if the index has none. Such a wheel must be pure Python."""
        before = set(self.folder.iterdir())
        platforms = [f"--platform={name}" for name in PLATFORMS]
        target = (f"--python-version={self.python}", "--implementation=cp", "--only-binary=:all:", *platforms)
        try:
            self._pip("download", requirement, *target, f"--dest={self.folder}")
        except nox.command.CommandFailed:
            self._pip("wheel", requirement, f"--wheel-dir={self.folder}")
        (path,) = set(self.folder.iterdir()) - before
        if not path.name.endswith(("-none-any.whl", *(f"{name}.whl" for name in PLATFORMS))):
            self.session.error(
                f"gpu_kit: {requirement} has no wheel for Python {self.python}, and {path.name} fits only this machine"
            )
        return path

    def _pip(self, command: str, *arguments: str) -> None:
        # DeepSpeed otherwise compiles its operators for this machine.
        options = ("--no-deps", "--disable-pip-version-check", "--quiet")
        self.pip.run(self.session, "python", "-m", "pip", command, *options, *arguments, DS_BUILD_OPS="0")


def _versions(path: Path) -> Iterator[tuple[str, str]]:
    """The names of a requirements file, each with its version, or "" if it gives none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            requirement = Requirement(text)
            yield canonicalize_name(requirement.name), str(requirement.specifier).removeprefix("==")


def _required_by(path: Path) -> list[Requirement]:
    with zipfile.ZipFile(path) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = email.message_from_bytes(archive.read(metadata))
    return [Requirement(text) for text in message.get_all("Requires-Dist", [])]
