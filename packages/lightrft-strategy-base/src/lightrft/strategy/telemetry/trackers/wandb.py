"""Weights & Biases. Reads its own environment variables: WANDB_MODE, WANDB_ENTITY, WANDB_RUN_ID, WANDB_RESUME.

``wandb.log`` drops a step that is smaller than the one before, which a run that resumes may log. So the step is a metric,
and the horizontal axis of all others.
"""

from collections.abc import Mapping
from typing import Any

import wandb

from lightrft.strategy.telemetry.trackers.tracker import RunInfo


class WandB:
    """Writes to a run of Weights & Biases; its local files are in ``log_dir``."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Begin a run; with WANDB_RUN_ID and WANDB_RESUME=allow in the environment, continue that run."""
        if run.directory is not None:
            run.directory.mkdir(parents=True, exist_ok=True)
        settings = {**run.settings, "strategy": run.strategy, "world_size": run.world_size}
        self._run = wandb.init(
            project=run.project, name=run.name, dir=run.directory and str(run.directory), config=settings
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one entry."""
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        """End the run, which waits until it is uploaded."""
        self._run.finish()
