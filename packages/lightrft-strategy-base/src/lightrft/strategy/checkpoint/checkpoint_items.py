"""What a checkpoint contains: models with their optimizers and schedulers, loader positions, random states.

`RunState` resolves the arguments of `save_ckpt` and `load_ckpt` and holds what a run keeps from one checkpoint to the
next. `plan` turns it into tensors and JSON values; `load_checkpoint` restores it.
"""

import json
import random
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import ArgumentError, ArgumentTypeError, CheckpointError, StrategyError
from lightrft.config.validation import shown
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.types import Shard, TrainedModel
from lightrft.strategy.checkpoint.format import RANKS
from lightrft.strategy.data.loaders import ResumableLoader
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.models.optimizers import check_kinds
from lightrft.strategy.models.prepare import Preparation
from lightrft.strategy.models.registry import ModelRegistry
from lightrft.strategy.step.moving_average import MovingAverages

Models = nn.Module | Mapping[str, nn.Module]
"""One model, or several by name."""
SINGLE = "model"
"""The name of a model that is saved alone."""


@dataclass(frozen=True, kw_only=True)
class CheckpointItem:
    """One model under its name in the checkpoint."""

    name: str
    module: nn.Module
    """Unwrapped."""
    model_class: type[nn.Module]
    """Class of the model before preparing, which may replace it."""
    trained: TrainedModel | None
    """None: only the weights are saved."""
    scheduler: Any = None

    @property
    def scheduler_class(self) -> str | None:
        """Class of the scheduler, with the classes of the schedulers in it."""
        return None if self.scheduler is None else _scheduler_class(self.scheduler)

    def parameters_of(self, backend: Backend) -> Iterator[Shard]:
        """Yield the parameters that this rank holds, under their entries."""
        for shard in backend.shards(self.module):
            yield shard.renamed(f"{self.name}/parameters/{shard.name}")

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the persistent buffers by name."""
        persistent = set(self.module.state_dict(keep_vars=True))
        return {name: buffer for name, buffer in self.module.named_buffers() if name in persistent}

    def check_no_pending_gradient(self) -> None:
        """Raise `StrategyError` within an update, while a gradient is pending."""
        if self.trained is not None and self.trained.has_pending_gradient:
            raise StrategyError(
                f"expected no pending gradient of {type(self.module).__name__}, got {self.trained.micro_batches} of "
                f"{self.trained.accumulation_steps} micro-batches accumulated. Call this after "
                f"an optimizer_step that applied or skipped an update. If the last micro-batches do not fill an update, pass "
                f"boundary=True to the last optimizer_step, which then updates with fewer"
            )


def _scheduler_class(scheduler: object) -> str:
    parts = [_scheduler_class(inner) for inner in getattr(scheduler, "_schedulers", ())]
    return type(scheduler).__name__ + (f" of {', '.join(parts)}" if parts else "")


class RunState:
    """What saving and loading need from a strategy, and what a run keeps from one checkpoint to the next."""

    def __init__(
        self, strategy: str, backend: Backend, models: ModelRegistry, preparation: Preparation, consensus: RankConsensus,
        averages: MovingAverages,
    ) -> None:  # fmt: skip
        self.strategy, self.backend, self.consensus = strategy, backend, consensus
        self._models, self._preparation = models, preparation
        self.averages = averages
        self.loaders = LoaderPositions()
        self.lineages: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        """By model, an identifier that stays the same when a restarted run loads the model."""

    def items(self, call: str, model: Models, optimizer: object, scheduler: object) -> list[CheckpointItem]:
        """Return the models of ``call`` with their optimizers and schedulers. All ranks must call this.

        Raises:
            ArgumentError: On every rank, if the arguments do not match each other.
            StrategyError: On every rank, if a model was not prepared, was offloaded, or has another optimizer.
        """
        with self.consensus.together(call, "resolving arguments"):
            names = _checked_names(model) if isinstance(model, Mapping) else None
            models = dict(model) if isinstance(model, Mapping) else _by_name("model", model, names)
            optimizers, schedulers = _by_name("optimizer", optimizer, names), _by_name("scheduler", scheduler, names)
            return [
                self._item(call, name, module, optimizers[name], schedulers[name]) for name, module in models.items()
            ]

    def updates_averaged(self, item: CheckpointItem) -> int | None:
        """Return the number of updates that ``item`` includes if it is a moving average, else None."""
        return None if item.trained is not None else self.averages.updates_in(item.module, self._models.in_training)

    def _item(
        self, call: str, name: str, model: object, optimizer: Optimizer | None, scheduler: object
    ) -> CheckpointItem:
        if not isinstance(model, nn.Module):
            raise StrategyError(
                f"{call}: expected a model or a dict of models, got {shown(model)} as {name}. Pass the model "
                f"that prepare returned"
            )
        if scheduler is not None and (isinstance(scheduler, type) or not hasattr(scheduler, "state_dict")):
            raise ArgumentTypeError(
                f"{call}: expected the scheduler to have state_dict and load_state_dict, got {shown(scheduler)}"
            )
        if optimizer is not None:
            check_kinds(call, model, optimizer)
            self._preparation.accept_unprepared(model, optimizer)
            self._models.require_trained(model, optimizer, call)
        prepared = self._models.find(model)
        if prepared is None and self.backend.accepts_unprepared:
            module = self._models.unwrap(model)
            self._preparation.warn_of_unprepared(module)
            return CheckpointItem(name=name, module=module, model_class=type(module), trained=None, scheduler=scheduler)
        prepared = self._models.require_ready(model, call)
        trained = prepared.trained
        if scheduler is None and trained is not None:
            scheduler = trained.scheduler
        return CheckpointItem(
            name=name, module=prepared.module, model_class=prepared.model_class, trained=trained, scheduler=scheduler
        )


def _checked_names(models: Mapping[Any, Any]) -> list[str]:
    """Return the names of ``models``. Raise `ArgumentError` for names that no model can have in a checkpoint."""
    bad = [name for name in models if not isinstance(name, str) or not name or "/" in name or name == RANKS]
    if bad or not models:
        raise ArgumentError(
            f"expected model to be a dict whose keys are strings without '/', other than {RANKS!r}, got "
            f"{bad or 'an empty dict'}. Rename the models"
        )
    return list(models)


def _by_name(argument: str, value: object, names: list[str] | None) -> dict[str, Any]:
    """Return ``value`` by model name.

    Args:
        names: The names of the models if they were passed in a mapping, else None.
    """
    if names is None:
        if isinstance(value, Mapping):
            raise ArgumentError(
                f"expected one {argument} for one model, got a dict. Pass both model and {argument} as dicts, or neither"
            )
        return {SINGLE: value}
    if value is None:
        return dict.fromkeys(names)
    if not isinstance(value, Mapping) or not set(value) <= set(names):
        raise ArgumentError(
            f"expected {argument} to be a dict whose keys are model names, got {value!r}. The models are: {', '.join(names)}"
        )
    return {name: value.get(name) for name in names}


# Loaders

Position = dict[str, Any]
"""The position of a loader, and what its samples depend on, as JSON values."""


class LoaderPositions:
    """The loaders that `setup_dataloader` made, and loaded positions that wait for their loader.

    A checkpoint has the positions of the loaders that exist, in the order in which they were made. Loading restores them in
    this order, first to loaders that exist, then to loaders that are made afterwards.
    """

    def __init__(self) -> None:
        self._made: list[weakref.ref[ResumableLoader]] = []
        self._waiting: list[Position] = []

    @property
    def _alive(self) -> list[ResumableLoader]:
        return [loader for reference in self._made if (loader := reference()) is not None]

    def add(self, loader: ResumableLoader) -> None:
        """Save the position of ``loader`` as long as it exists.

        A loaded position that waits for its loader is restored to it, unless the caller gave it one.

        Raises:
            CheckpointError: The position is that of a different loader.
        """
        if self._waiting:
            _check_position(loader, self._waiting[0], len(self._alive))
            position = self._waiting.pop(0)
            if not loader.consumed_samples:
                loader.load_state_dict(position)
        self._made.append(weakref.ref(loader))

    def positions(self) -> list[Position]:
        """Return the positions for a checkpoint."""
        return [{**loader.order(), **loader.state_dict()} for loader in self._alive] + self._waiting

    def check(self, positions: Sequence[Position]) -> None:
        """Raise `CheckpointError` if a position was saved by a different loader than the one that would get it."""
        for index, (loader, position) in enumerate(zip(self._alive, positions, strict=False)):
            _check_position(loader, position, index)

    def restore(self, positions: Sequence[Position]) -> None:
        """Restore ``positions``, which were checked."""
        alive = self._alive
        for loader, position in zip(alive, positions, strict=False):
            loader.load_state_dict(position)
        self._waiting = list(positions[len(alive) :])


def _check_position(loader: ResumableLoader, position: Position, index: int) -> None:
    # The position counts samples over all ranks: the number of ranks and the batch size may differ.
    order = {name: value for name, value in loader.order().items() if name not in ("ranks", "batch_size")}
    differing = [name for name, value in order.items() if value != position[name]]
    if differing:
        expected, got = (", ".join(f"{name}={values[name]}" for name in differing) for values in (position, order))
        raise CheckpointError(
            f"expected loader {index} of setup_dataloader to have {expected}, as in the checkpoint, got {got}. Create the loaders "
            f"in the same order from the same data, or pass load_module_only=True to load_ckpt"
        )


# Random number generators

RngStates = dict[str, torch.Tensor]
"""State by name, 1-D uint8. Each rank stores its own."""


def rng_states(device: torch.device) -> RngStates:
    """Return the states of the random number generators of Python, NumPy, torch and the CUDA device. Draws nothing."""
    name, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "python": _encode(random.getstate()),
        "numpy": _encode([name, np.asarray(keys).tolist(), *rest]),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_rng_states(states: RngStates, device: torch.device) -> None:
    """Set the random number generators to ``states``; one that is not in it stays as it is."""
    if "python" in states:
        version, state, gauss = json.loads(states["python"].numpy().tobytes())
        random.setstate((version, tuple(state), gauss))
    if "numpy" in states:
        name, keys, *rest = json.loads(states["numpy"].numpy().tobytes())
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _encode(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
