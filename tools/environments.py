"""Environments for sessions. They are named by a hash of their contents, made once, and shared between sessions."""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import nox
from packaging.requirements import Requirement

from tools.locks import locked
from tools.projects import ROOT, closure
from tools.uv import uv
from tools.wheels import wheel

STORE = ROOT / ".nox/environments"


@dataclass(frozen=True)
class Environment:
    """A virtual environment with ``requirements``; packages of this repository are installed from their wheels."""

    requirements: tuple[str, ...]
    unresolved: tuple[str, ...] = ()
    """Requirements to install without their dependencies."""
    pins: str = "constraints/cpu.txt"
    exact: bool = False
    """Install ``pins`` as a list, without resolving. (Its torchvision is loaded without compiled operators.)"""
    lowest: bool = False
    """Install the lowest versions that the metadata of our packages allows. ``pins`` hold what must be higher."""
    replacements: tuple[str, ...] = ()
    """Pins to replace those in ``pins``; for exact environments."""
    torch: str = "cpu"
    """The build of torch, if the machine's configuration names no source of it."""
    launcher: tuple[str, ...] = ()
    """A command of the environment that runs its programs, given as arguments."""

    @property
    def folder(self) -> Path:
        """Its path, whether or not it exists."""
        pins = (ROOT / self.pins).read_text(encoding="utf-8")
        facts = (
            *closure(self.requirements),
            self.unresolved,
            pins,
            self.exact,
            self.lowest,
            self.replacements,
            self.torch,
            sys.version,
            sys.platform,
        )
        names = [Requirement(text).name.removeprefix("lightrft-") for text in self.requirements]
        return STORE / f"{'-'.join(names[:2])}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin/python"

    def prepare(self, session: nox.Session) -> None:
        """Make it unless it exists, and reinstall our packages that have changed."""
        start = time.monotonic()
        wheels = {name: wheel(session, name) for name in closure(self.requirements)[0]}
        expected = {name: str(path) for name, path in wheels.items()}
        record = self.folder / "wheels.json"
        with locked(self.folder):
            installed = json.loads(record.read_text("utf-8")) if record.is_file() else None
            if installed == expected:
                return
            if installed is None:
                self._make(session, wheels)
            else:
                changed = set(wheels.values()) - set(map(Path, installed.values()))
                self._install(session, "--no-deps", "--reinstall", *changed)
            record.write_text(json.dumps(expected), encoding="utf-8")
        session.log(f"{self.folder.relative_to(ROOT)}: ready in {time.monotonic() - start:.1f} s")

    def run(
        self,
        session: nox.Session,
        program: str,
        *arguments: str | Path,
        cwd: Path | None = None,
        output: IO[str] | None = None,
        **variables: str | None,
    ) -> None:
        """Run one of its programs. ``cwd``: by default a folder outside the sources."""
        first, *others = (*self.launcher, program)
        command = (str(self.folder / "bin" / first), *others, *map(str, arguments))
        with session.chdir(cwd or session.cache_dir):
            session.run(
                *command, env=self._variables() | variables, stdout=output, external=True, interrupt_timeout=60.0,
                terminate_timeout=10.0,
            )  # fmt: skip

    def _make(self, session: nox.Session, wheels: Mapping[str, Path]) -> None:
        uv(session, "venv", "--clear", "--python", sys.executable, self.folder)
        if self.exact:
            self._install(session, "--no-deps", "-r", ROOT / self.pins, *wheels.values())
            if self.replacements:
                self._install(session, "--no-deps", *self.replacements)
            self._stub_torchvision_operators()
            return
        extras, others = closure(self.requirements)
        ours = [f"{path}[{','.join(sorted(extras[name]))}]" if extras[name] else path for name, path in wheels.items()]
        resolution = "lowest-direct" if self.lowest else "highest"
        self._install(session, "--constraints", ROOT / self.pins, f"--resolution={resolution}", *ours, *others)
        uv(session, "pip", "check", "--python", self.python)
        if self.unresolved:
            self._install(session, "--constraints", ROOT / self.pins, "--no-deps", *self.unresolved)

    def _stub_torchvision_operators(self) -> None:
        """Make Python run tools/torchvision_operators.py at start."""
        (packages,) = self.folder.glob("lib/python*/site-packages")
        shutil.copy(ROOT / "tools/torchvision_operators.py", packages / "_torchvision_operators.py")
        (packages / "torchvision_operators.pth").write_text("import _torchvision_operators\n", encoding="utf-8")

    def _install(self, session: nox.Session, *arguments: str | Path) -> None:
        builds = ("--build-constraints", ROOT / "constraints/cpu.txt")
        uv(session, "pip", "install", "--python", self.python, *builds, *arguments, torch=self.torch)

    def _variables(self) -> dict[str, str | None]:
        return {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",  # torch runs ninja by name
            "VIRTUAL_ENV": str(self.folder),
            "PYTHONPATH": None,
            "PYTHONHOME": None,
            "PYTHONDONTWRITEBYTECODE": None,  # otherwise every process compiles torch again
            "TORCH_EXTENSIONS_DIR": None,  # lightrft-deepspeed sets one per environment, in XDG_CACHE_HOME
            "XDG_CACHE_HOME": str(ROOT / ".nox/cache"),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
        }
