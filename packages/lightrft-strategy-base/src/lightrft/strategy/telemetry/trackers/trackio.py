"""Trackio: Hugging Face's local tracker. Reads its own environment variables, such as TRACKIO_DIR and TRACKIO_SPACE_ID."""

from collections.abc import Mapping
from typing import Any

import trackio

from lightrft.strategy.telemetry.trackers.tracker import RunInfo


class Trackio:
    """Writes to Trackio's database; ``trackio show`` displays it."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Begin a run, or continue the one with this name."""
        settings = {**run.settings, "strategy": run.strategy, "world_size": run.world_size}
        resume = "never" if run.name is None else "allow"
        self._run = trackio.init(project=run.project, name=run.name, config=settings, resume=resume, embed=False)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one entry."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()
