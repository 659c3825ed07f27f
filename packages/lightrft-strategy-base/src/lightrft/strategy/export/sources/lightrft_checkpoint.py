"""Checkpoints that `save_ckpt` wrote: one of the models in them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from lightrft.config import ArgumentError
from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader
from lightrft.strategy.export.sources.source import empty


class CheckpointSource:
    """The parameters, in master precision, and the buffers of one model."""

    names: Literal["saved", "in memory"] = "in memory"

    def __init__(self, path: Path, model: str | None) -> None:
        """Verify all checksums.

        Args:
            path: The checkpoint.
            model: Name of the model in it; None: the only one.
        """
        self.path = path
        with CheckpointReader(path) as checkpoint:
            self._model = _chosen(checkpoint, model)
            checkpoint.verify()
            self._entries = {name: f"{prefix}{name}" for prefix in self._prefixes for name in checkpoint.shapes(prefix)}
            pieces = {name: checkpoint.index[entry][0][1] for name, entry in self._entries.items()}
            self.facts: Mapping[str, Any] = checkpoint.state["models"][self._model]
        self.contents: Mapping[str, torch.Tensor] = {
            name: empty(piece.shape, piece.dtype) for name, piece in pieces.items()
        }
        self._checkpoint: CheckpointReader | None = None

    @property
    def _prefixes(self) -> tuple[str, ...]:
        """Entries of parameters and buffers; of buffers that differ between ranks, those of rank 0."""
        return f"{self._model}/parameters/", f"{self._model}/buffers/", f"ranks/0/buffers/{self._model}/"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the files open for `read`."""
        with CheckpointReader(self.path) as self._checkpoint:
            yield

    def read(self, name: str) -> torch.Tensor:
        """Return a full tensor, assembled from the pieces of the ranks."""
        assert self._checkpoint is not None
        return self._checkpoint.tensor(self._entries[name])


def _chosen(checkpoint: CheckpointReader, model: str | None) -> str:
    saved = checkpoint.models
    if model is None and len(saved) == 1:
        return saved[0]
    if model not in saved:
        raise ArgumentError(
            f"expected --model to name one of the models in {checkpoint.path}, got {model}. Pass one of: {', '.join(saved)}"
        )
    return str(model)
