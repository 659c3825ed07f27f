"""Environments for sessions: named by what is in them, made once, used by every session that needs the same."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import nox
from packaging.requirements import Requirement

from tools.projects import ROOT, closure
from tools.uv import uv
from tools.wheels import wheel

STORE = ROOT / ".nox/environments"


@dataclass(frozen=True)
class Environment:
    """A Python with the packages that ``requirements`` name; ours come from their wheels."""

    requirements: tuple[str, ...]
    unresolved: tuple[str, ...] = ()
    """Installed without what they say that they need."""
    pins: str = "constraints/cpu.txt"
    complete: bool = False
    """``pins`` is all that others made, to be installed as it stands; torchvision among it comes without operators."""
    instead: tuple[str, ...] = ()
    """Versions in place of those in ``pins``, of a complete one."""
    torch: str = "cpu"
    """The build of torch, where the machine does not say where to get it."""
    under: tuple[str, ...] = ()
    """A command of its own under which its programs run, given theirs as arguments."""

    @property
    def folder(self) -> Path:
        """Where it is, or will be."""
        pins = (ROOT / self.pins).read_text(encoding="utf-8")
        facts = (
            *closure(self.requirements),
            self.unresolved,
            pins,
            self.complete,
            self.instead,
            self.torch,
            sys.version,
            sys.platform,
        )
        names = [Requirement(it).name.removeprefix("lightrft-") for it in self.requirements]
        return STORE / f"{'-'.join(names[:2])}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin/python"

    def prepare(self, session: nox.Session) -> None:
        """Make it, if it is not there, and bring our packages in it up to date."""
        began = time.monotonic()
        wheels = {name: wheel(session, name) for name in closure(self.requirements)[0]}
        wanted = {name: str(path) for name, path in wheels.items()}
        record = self.folder / "wheels.json"
        with _alone(self.folder):
            known = json.loads(record.read_text("utf-8")) if record.is_file() else None
            if known == wanted:
                return
            if known is None:
                self._make(session, wheels)
            else:
                self._install(
                    session, "--no-deps", "--reinstall", *(set(wheels.values()) - set(map(Path, known.values())))
                )
            record.write_text(json.dumps(wanted), encoding="utf-8")
        session.log(f"{self.folder.relative_to(ROOT)}: ready in {time.monotonic() - began:.1f} s")

    def run(
        self,
        session: nox.Session,
        program: str,
        *arguments: str | Path,
        cwd: Path | None = None,
        output: IO[str] | None = None,
        **variables: str | None,
    ) -> None:
        """Run one of its programs; in a folder away from the sources, if no other is given."""
        first, *others = (*self.under, program)
        command = (str(self.folder / "bin" / first), *others, *map(str, arguments))
        with session.chdir(cwd or session.cache_dir):
            session.run(
                *command, env=self._variables() | variables, stdout=output, external=True, interrupt_timeout=60.0,
                terminate_timeout=10.0,
            )  # fmt: skip

    def _make(self, session: nox.Session, wheels: Mapping[str, Path]) -> None:
        uv(session, "venv", "--clear", "--python", sys.executable, self.folder)
        if self.complete:
            self._install(session, "--no-deps", "-r", ROOT / self.pins, *wheels.values())
            if self.instead:
                self._install(session, "--no-deps", *self.instead)
            self._admit_torchvision()
            return
        ours, others = closure(self.requirements)
        named = [f"{path}[{','.join(sorted(ours[name]))}]" if ours[name] else path for name, path in wheels.items()]
        self._install(session, "--constraints", ROOT / self.pins, *named, *others)
        uv(session, "pip", "check", "--python", self.python)
        if self.unresolved:
            self._install(session, "--constraints", ROOT / self.pins, "--no-deps", *self.unresolved)

    def _admit_torchvision(self) -> None:
        """Have Python run tools/torchvision_operators.py when it starts."""
        (packages,) = self.folder.glob("lib/python*/site-packages")
        shutil.copy(ROOT / "tools/torchvision_operators.py", packages / "_torchvision_operators.py")
        (packages / "torchvision_operators.pth").write_text("import _torchvision_operators\n", encoding="utf-8")

    def _install(self, session: nox.Session, *arguments: str | Path) -> None:
        builds = ("--build-constraints", ROOT / "constraints/cpu.txt")
        uv(session, "pip", "install", "--python", self.python, *builds, *arguments, torch=self.torch)

    def _variables(self) -> dict[str, str | None]:
        return {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",  # torch starts ninja by its name
            "VIRTUAL_ENV": str(self.folder),
            "PYTHONPATH": None,
            "PYTHONHOME": None,
            "PYTHONDONTWRITEBYTECODE": None,  # or every process compiles all of torch again
            "TORCH_EXTENSIONS_DIR": None,  # lightrft-deepspeed has one for each environment, in the cache
            "XDG_CACHE_HOME": str(ROOT / ".nox/cache"),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false"),
        }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other runs of nox."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
