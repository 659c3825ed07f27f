"""TensorBoard: event files in the directory of the run. Needs the package tensorboard, not TensorFlow."""

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lightrft.strategy.telemetry.trackers.tracker import RunInfo


class TensorBoard:
    """Writes scalars to ``log_dir``. TensorBoard shows each directory with event files as a run."""

    def start(self, run: RunInfo) -> None:
        """Begin a new event file; TensorBoard joins those of one directory."""
        self._writer = SummaryWriter(str(run.directory or Path()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one scalar for each metric, and flush."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """End the event file."""
        self._writer.close()
