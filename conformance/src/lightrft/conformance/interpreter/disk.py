"""The disk of a program: one directory for the checkpoints of all ranks, which `empty_disk` clears."""

import resource
import shutil
from pathlib import Path

from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.scratch import scratch


def disk() -> Path:
    """The directory of the checkpoints."""
    return scratch("checkpoints")


@operation
def empty_disk(session: Session, keep: bool = True) -> None:
    """Remove all checkpoints; without ``keep``, their directory too."""
    allow_writes(session)
    if session.rank == 0:
        shutil.rmtree(disk(), ignore_errors=True)
        if keep:
            disk().mkdir(parents=True)


@operation
def refuse_writes(session: Session) -> None:
    """Limit every file of this process to a few bytes, so that the system refuses writes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@operation
def allow_writes(session: Session) -> None:
    """Undo `refuse_writes`."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@operation
def visible_names(session: Session, store: str = "s") -> list[str]:
    """The directories in a store, sorted. Ranks wait for each other before going on."""
    names = sorted(path.name for path in (disk() / store).iterdir() if path.is_dir())
    session.strategy.sync_and_clear_cache()
    return names


@operation
def foreign_directory(session: Session, store: str, name: str, text: str = "keep me") -> None:
    """Create a directory in the store that is not a checkpoint."""
    if session.rank == 0:
        (disk() / store / name).mkdir(parents=True)
        (disk() / store / name / "notes.txt").write_text(text)


@operation
def rename(session: Session, store: str, old: str, new: str) -> None:
    """Rename a directory in the store."""
    if session.rank == 0:
        (disk() / store / old).rename(disk() / store / new)


@operation
def hidden_names(session: Session, store: str = "s") -> list[str]:
    """The hidden names in a store, sorted. Ranks wait for each other before going on."""
    names = sorted(path.name for path in (disk() / store).iterdir() if path.name.startswith("."))
    session.strategy.sync_and_clear_cache()
    return names
