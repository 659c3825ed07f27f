"""`log`: sends the metrics of a script, and the strategy's own, to the trackers of a run.

Rank 0 writes; other ranks only check the arguments, and no rank waits for another. A tracker that fails is reported once and
does not stop the training; see `lightrft.strategy.telemetry.writers`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy import registry
from lightrft.strategy.arguments import INDEX, refusal
from lightrft.strategy.telemetry.log import logger
from lightrft.strategy.telemetry.metrics import flatten, on_host
from lightrft.strategy.telemetry.recorder import Recorder
from lightrft.strategy.telemetry.trackers.jsonl import JsonLines
from lightrft.strategy.telemetry.trackers.tracker import RunInfo, Tracker
from lightrft.strategy.telemetry.writers import BackgroundWriter, DirectWriter, Writer


class Tracking:
    """The trackers of a run, and the recorder of what is written to them."""

    def __init__(self, writers: Sequence[Writer], recorder: Recorder | None) -> None:
        """Create it from its parts.

        Args:
            writers: One for each tracker.
            recorder: None on ranks that do not write, and without trackers.
        """
        self._writers, self.recorder = writers, recorder
        self._has_said = False

    @classmethod
    def begin(
        cls, config: StrategyConfig, strategy: str, rank: int, world_size: int, device: torch.device
    ) -> "Tracking":
        """Return the tracking of a run. Imports the trackers on rank 0; none is started before the first `log`.

        Raises:
            BackendNotInstalledError, ConfigError: On rank 0, if a tracker is not installed or unknown.
        """
        names = tracker_names(config)
        if rank != 0 or not names:
            return cls([], None)
        run = RunInfo(
            project=config.log_project, name=config.log_name, strategy=strategy, world_size=world_size,
            directory=None if config.log_dir is None else _absolute(config.log_dir),
            settings={name: value for name, value in config.to_dict().items() if name != "extra_args"},
        )  # fmt: skip
        return cls([_writer(name, run) for name in names], Recorder(device, config.max_norm))

    def log(self, metrics: object, step: object, is_writer: bool) -> None:
        """Check the arguments, and write on the rank for which ``is_writer``; see `StrategyBase.log`."""
        if not INDEX.matches(step):
            raise refusal("log", "step", step, INDEX, "Pass the number of updates or of rollouts so far")
        flat = flatten(metrics)
        if self.recorder is not None:
            values = on_host({**self.recorder.take(), **flat})
            for writer in self._writers:
                writer.log(values, int(step))  # type: ignore[call-overload]
        elif is_writer and not self._has_said:
            self._has_said = True
            logger.warning(
                "log: expected a destination for the metrics, got none, so nothing is written. Set log_dir for JSON lines, or "
                "name trackers, in the settings of the strategy"
            )

    def close(self) -> None:
        """Write what is left, and close the trackers. Idempotent."""
        writers, self._writers, self.recorder = self._writers, [], None
        for writer in writers:
            writer.close()


def tracker_names(config: StrategyConfig) -> list[str]:
    """Return the names of the trackers of a run, each once: JSON lines if there is a directory, then the setting's."""
    return list(dict.fromkeys([*(["jsonl"] if config.log_dir is not None else []), *config.trackers]))


def _writer(name: str, run: RunInfo) -> Writer:
    tracker = registry.load(registry.TRACKERS, name, Tracker)()  # type: ignore[type-abstract]
    return (DirectWriter if isinstance(tracker, JsonLines) else BackgroundWriter)(name, tracker, run)


def _absolute(log_dir: str) -> Path:
    try:
        return Path(log_dir).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(
            f"expected log_dir in a home directory that exists, got {log_dir!r}: {error} Pass an absolute path"
        ) from error
