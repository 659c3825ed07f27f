"""The models of one `save_ckpt` or `load_ckpt`, each with what trains it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightrft.config import ArgumentError, StrategyError
from lightrft.strategy.backend import Backend
from lightrft.strategy.shards import Shard
from lightrft.strategy.training.trained_model import TrainedModel

ALONE = "model"
"""The name of a model that is saved by itself."""
RANKS = "ranks"
"""Where entries of single ranks are; no model has this name."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model under the name that it has in the checkpoint."""

    name: str
    module: nn.Module
    """Unwrapped."""
    kind: type[nn.Module]
    """Its class before it was prepared, which may replace it."""
    trained: TrainedModel | None
    """None: its weights alone."""
    scheduler: Any = None

    @property
    def schedule(self) -> str | None:
        """What schedule it is: the class, and the classes of those that it is made of."""
        return None if self.scheduler is None else _composition(self.scheduler)

    def parameters_of(self, backend: Backend) -> Iterator[Shard]:
        """The parameters that this rank holds, by entry."""
        for shard in backend._shards(self.module):
            yield shard.renamed(f"{self.name}/parameters/{shard.name}")

    def buffers(self) -> dict[str, torch.Tensor]:
        """The persistent buffers by name."""
        persistent = set(self.module.state_dict(keep_vars=True))
        return {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}

    def check_settled(self, call: str) -> None:
        """Raise `StrategyError` inside a window of micro-batches."""
        if self.trained is not None and self.trained.has_pending_gradient:
            raise StrategyError(
                f"{call}: {type(self.module).__name__} has a gradient that no update has used yet "
                f"({self.trained.micro_batches} of {self.trained.window} micro-batches); a checkpoint stands between "
                f"updates: call it where optimizer_step returned applied or skipped, or end the window with boundary=True"
            )


def _composition(scheduler: Any) -> str:
    parts = [_composition(it) for it in getattr(scheduler, "_schedulers", ())]
    return type(scheduler).__name__ + (f" of {', '.join(parts)}" if parts else "")


def named(what: str, value: Any, names: list[str] | None) -> dict[str, Any]:
    """``value`` by the models' names: a mapping as it is, a single one for a model by itself.

    ``names``: those of the models where they came in a mapping, else None.
    """
    if names is None:
        if isinstance(value, Mapping):
            raise ArgumentError(f"{what} is a mapping, and the model is none; pass both in the same way")
        return {ALONE: value}
    if value is None:
        return dict.fromkeys(names)
    if not isinstance(value, Mapping) or not set(value) <= set(names):
        raise ArgumentError(f"{what} must be a mapping from names of the models ({', '.join(names)}), as model is")
    return {name: value.get(name) for name in names}


def check_names(models: Mapping[Any, Any]) -> None:
    """Raise `ArgumentError` for names that no model can have in a checkpoint."""
    bad = [name for name in models if not isinstance(name, str) or not name or "/" in name or name == RANKS]
    if bad or not models:
        raise ArgumentError(
            f"model: names of models are strings without '/', other than {RANKS!r}; got {bad or 'no model at all'}"
        )
