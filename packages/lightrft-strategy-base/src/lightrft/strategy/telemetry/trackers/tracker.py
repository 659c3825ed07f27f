"""The interface of a tracker, and the description of the run that it gets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a tracker may write about a run."""

    project: str
    """The setting ``log_project``."""
    name: str | None
    """The setting ``log_name``. None: the tracker chooses one."""
    directory: Path | None
    """The setting ``log_dir``, which may not exist yet. None: the run has no directory."""
    strategy: str
    """Name of the strategy."""
    world_size: int
    """Number of ranks."""
    settings: Mapping[str, object]
    """The settings of the run, as JSON values. Without ``extra_args``, in which scripts pass keys and passwords."""


@runtime_checkable
class Tracker(Protocol):
    """Writes the metrics of a run. There is one object for each run, on rank 0 only, made without arguments.

    All methods are called on one thread that only this tracker uses, except those of `JsonLines`, so they may wait for a disk or
    a network. An exception is reported once, and does not stop the training: after one in `start`, the tracker is not
    called again; after one in `log`, it is called with the next metrics.
    """

    def start(self, run: RunInfo) -> None:
        """Begin, or continue, the run. Called before the first `log`; not at all in a run without one."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write ``metrics``, by name, "/" between the parts of a name. Values are ints or floats, which may be NaN or infinite.

        ``step`` may repeat, and may be smaller than before: a run that resumes begins with the step of its checkpoint.
        """

    def close(self) -> None:
        """Write what is not written yet, and free everything. Called once, after `start`."""
