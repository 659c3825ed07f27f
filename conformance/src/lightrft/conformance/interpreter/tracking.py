"""Operations that log metrics, and the trackers that get them."""

from collections.abc import Mapping
from typing import ClassVar

from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.values import Record
from lightrft.strategy.telemetry.trackers import RunInfo


class RecordingTracker:
    """A tracker that keeps what this process logs."""

    entries: ClassVar[list[Record]] = []
    """The metrics of each call, and its step."""

    def start(self, run: RunInfo) -> None:
        """There is nothing to start."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep them."""
        self.entries.append({**metrics, "step": step})

    def close(self) -> None:
        """There is nothing to close."""


class FailingTracker(RecordingTracker):
    """A tracker that always fails."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Raise."""
        raise OSError("no space left on device")


@operation
def log(session: Session, metrics: Record, step: int) -> None:
    """log."""
    session.strategy.log(metrics, step)


@operation
def logged(session: Session) -> list[Record]:
    """Close the strategy; what its trackers got on this rank."""
    session.close()
    entries = list(RecordingTracker.entries)
    RecordingTracker.entries.clear()
    return entries
