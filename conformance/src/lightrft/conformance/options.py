"""The options of the command `lightrft-conformance`, and what they accept."""

import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import typer

from lightrft.conformance.profiles import MOST_PROCESSES, PROFILES


def _world(ranks: int) -> int:
    if not 1 <= ranks <= MOST_PROCESSES:
        raise typer.BadParameter(f"expected 1 to {MOST_PROCESSES} ranks, which all run on this machine, got {ranks}")
    return ranks


def _jobs(jobs: int | None) -> int | None:
    if jobs is not None and not 1 <= jobs <= MOST_PROCESSES:
        raise typer.BadParameter(f"expected 1 to {MOST_PROCESSES} processes, got {jobs}")
    return jobs


def _seed(seed: int) -> int:
    if seed < 0:
        raise typer.BadParameter(f"expected a number from 0, got {seed}")
    return seed


def _seeds(count: int) -> int:
    if count < 1:
        raise typer.BadParameter(f"expected at least one seed, got {count}")
    return count


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {name!r}")
    return name


def _profile(name: str | None) -> str | None:
    if name is not None and name not in PROFILES:
        raise typer.BadParameter(f"expected one of {', '.join(PROFILES)}, got {name!r}")
    return name


def _home(path: Path) -> Path:
    """``path`` with the home directory for ``~``, which shells leave as it is after "="."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"expected a path in a home directory that exists, got {path}: {error}") from error


def _readable(path: Path | None) -> Path | None:
    path = None if path is None else _home(path)
    if path is not None and not path.is_file():
        raise typer.BadParameter(f"expected an existing file, got {path}")
    return path


def _writable(path: Path | None) -> Path | None:
    path = None if path is None else _home(path)
    if path is None:
        return None
    if path.is_dir() or not path.parent.is_dir():
        raise typer.BadParameter(f"expected a file in an existing directory, got {str(path)!r}")
    if not _can_write(path):
        raise typer.BadParameter(f"expected a file that this user can write, got {str(path)!r}")
    return path


def _can_write(path: Path) -> bool:
    """Try to write: permission bits do not tell for a read-only file system, or for root."""
    if path.exists():
        return os.access(path, os.W_OK)
    try:
        with TemporaryFile(dir=path.parent):
            return True
    except OSError:
        return False


World = Annotated[int, typer.Option("--world-size", help="Number of ranks", callback=_world)]
Device = Annotated[str, typer.Option(help="Device of the models: cpu or cuda", callback=_device)]
ProfileOption = Annotated[
    str, typer.Option("--profile", help=f"How many programs to run: {', '.join(PROFILES)}", callback=_profile)
]
ControlsProfile = Annotated[
    str | None,
    typer.Option("--controls-profile", help="Profile of the controls. Default: --profile", callback=_profile),
]
RunJobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", callback=_jobs,
        help="Clauses to run in parallel. Default: about one per core for certify and nightly, else 1",
    ),
]  # fmt: skip
SaboteurJobs = Annotated[
    int | None, typer.Option("--jobs", help="Number of processes. Default: one per core", callback=_jobs)
]
Clauses = Annotated[list[str] | None, typer.Option("--clause", help="Run only this clause; may be repeated")]
Seed = Annotated[int, typer.Option(help="Seed for drawing programs", callback=_seed)]
Seeds = Annotated[int, typer.Option(help="Number of seeds, starting at --seed", callback=_seeds)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Setting of the strategy, NAME=VALUE; may be repeated")
]
Expected = Annotated[Path | None, typer.Option("--expected", help="TOML file of expected failures", callback=_readable)]
ReportFile = Annotated[
    Path | None, typer.Option("--report", help="Write a JSON report to this file", callback=_writable)
]


def renderable(files: list[Path] | None) -> list[Path]:
    """The files to write a certificate to. Raises typer.BadParameter if their names do not tell the format."""
    from lightrft.conformance.certificates.formats import FORMATS

    files = [_home(file) for file in files or ()]
    for file in files:
        _writable(file)
        if file.suffix not in FORMATS:
            raise typer.BadParameter(f"expected a file named {', '.join(FORMATS)}, got {file}")
    return files
