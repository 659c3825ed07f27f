"""Checkpoints that `save_ckpt` wrote: one of the models in them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from lightrft.config import ArgumentError
from lightrft.strategy.checkpoint.reading import Checkpoint
from lightrft.strategy.export.sources.source import empty


class CheckpointSource:
    """The parameters, in the precision in which they train, and buffers of one model."""

    names: Literal["saved", "in memory"] = "in memory"

    def __init__(self, place: Path, model: str | None) -> None:
        """``model``: its name in the checkpoint; None where there is one alone. All checksums are verified."""
        self.place = place
        with Checkpoint(place) as checkpoint:
            self._model = _chosen(checkpoint, model)
            checkpoint.verify()
            self._entries = {name: f"{prefix}{name}" for prefix in self._prefixes for name in checkpoint.names(prefix)}
            pieces = {name: checkpoint.index[entry][0][1] for name, entry in self._entries.items()}
            self.facts: Mapping[str, Any] = checkpoint.state["models"][self._model]
        self.contents: Mapping[str, torch.Tensor] = {name: empty(it.shape, it.dtype) for name, it in pieces.items()}
        self._checkpoint: Checkpoint | None = None

    @property
    def _prefixes(self) -> tuple[str, ...]:
        """Where parameters are, and buffers; those that differ between ranks are rank 0's."""
        return f"{self._model}/parameters/", f"{self._model}/buffers/", f"ranks/0/buffers/{self._model}/"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Around `read`: keeps the files open."""
        with Checkpoint(self.place) as self._checkpoint:
            yield

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, put together from what the ranks wrote."""
        assert self._checkpoint is not None
        return self._checkpoint.tensor(self._entries[name])


def _chosen(checkpoint: Checkpoint, model: str | None) -> str:
    there = checkpoint.models
    if model is None and len(there) == 1:
        return there[0]
    if model not in there:
        raise ArgumentError(f"{checkpoint.path} holds the models {', '.join(there)}; name one of them with --model")
    return str(model)
