"""Exponential moving averages of a trained model's weights, kept in a second model.

`TrainedModel.averages` counts which updates each average includes, so that a call moves an average once, if an
update was applied since the last call or since the average was prepared.
"""

import warnings
from collections.abc import Callable, Collection, Iterable
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightrft.config import ArgumentError
from lightrft.strategy.backend.adamw import trainable
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.types import Shard, TrainedModel
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.telemetry.log import is_silent


class MovingAverages:
    """The averages of one strategy. A call moves an average only if its source was updated since the last call."""

    def __init__(self, backend: Backend, consensus: RankConsensus) -> None:
        self._backend, self._consensus = backend, consensus
        self._sources: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        """The model from which each average last moved."""
        self._loaded: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        """The number of source updates that each average includes, if it was loaded and has not moved since."""

    def updates_in(self, average: nn.Module, trained: Iterable[TrainedModel]) -> int | None:
        """Return the number of updates of its source that ``average`` includes, for a checkpoint; None without a source.

        Args:
            average: Unwrapped.
            trained: All models in training. The source of an average that never moved is the first whose parameters it has.
        """
        if average in self._loaded:
            return self._loaded[average]
        names = {name for name, _ in average.named_parameters()}
        moved_from = self._sources.get(average)
        for source in trained:
            all_in = set(_names_in(names, trainable(source.model)).values()) <= names
            if source.model is moved_from or (moved_from is None and all_in):
                return source.updates_in(average)
        return None

    def restore(self, average: nn.Module, updates: int | None) -> None:
        """Set the number of updates that a loaded ``average`` includes: what `updates_in` returned when it was saved."""
        self._loaded.pop(average, None)
        if updates is not None:
            self._loaded[average] = updates

    @torch.no_grad()
    def move(self, source: TrainedModel, average: nn.Module, beta: float, device: torch.device | None) -> None:
        """Set ``average = beta * average + (1 - beta) * source``, in the dtype of the average. All ranks must call this.

        Args:
            source: The model that trains.
            average: With the parameter names of ``source``, or a wrapper of a model that has them.
            beta: In [0, 1).
            device: Device to compute on. Default: the device of the average.

        Raises:
            ArgumentError: ``beta`` is out of range, or ``average`` lacks a parameter of ``source``.
        """
        if not 0 <= beta < 1:
            raise ArgumentError(f"moving_average: expected beta >= 0 and < 1, got {beta!r}. Use for example 0.992")
        if self._loaded.get(average, source.updates_in(average)) == source.updates:
            return
        self._backend.reshard(source.model)
        self._backend.reshard(average)
        weights = trainable(source.model)
        parameters = dict(average.named_parameters())
        names = _names_in(parameters, weights)
        shards = {shard.name: shard for shard in self._backend.shards(average)}
        targets = {name: shards[average_name] for name, average_name in names.items() if average_name in shards}
        unknown = [name for name, average_name in names.items() if average_name not in parameters]
        if unknown:
            raise ArgumentError(
                f"moving_average: expected an average with the parameters of {source.class_name}, but the average has no "
                f"{unknown[0]}. Make it as a copy of the model that it averages"
            )
        if average not in self._sources:
            _warn_of_buffers(source, average)
        self._sources[average] = source.model
        self._loaded.pop(average, None)
        source.averages[average] = source.updates
        sources = {shard.name: shard for shard in self._backend.shards(source.model)}
        if self._same_layout(sources, targets, weights):
            for name in weights.keys() & targets.keys():
                _move_towards(targets[name], sources[name].values, beta, device)
            return
        for name, weight in weights.items():
            with self._backend.gathered([weight], torch.float32) as gathered:
                if name in targets:
                    _move_towards(targets[name], targets[name].of(gathered[0]), beta, device)

    def _same_layout(self, sources: dict[str, Shard], targets: dict[str, Shard], names: Iterable[str]) -> bool:
        """Return whether average and source have the same shards on every rank, so that nothing must be gathered."""
        same = all(
            (name in sources) == (name in targets)
            and (name not in sources or sources[name].range[1:] == targets[name].range[1:])
            for name in names
        )
        return all(self._consensus.exchange("moving_average", same))


def _names_in(average: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Return, by name in a model, the name in its average. Either may wrap a model of the other's class, as ``.model``."""
    same: Callable[[str], str] = str
    for rename in (same, "model.".__add__, lambda name: name.removeprefix("model.")):
        renamed = {name: rename(name) for name in names}
        if len(set(renamed.values())) == len(renamed) and set(renamed.values()) <= set(average):
            return renamed
    return {name: name for name in names}


def _warn_of_buffers(source: TrainedModel, average: nn.Module) -> None:
    """Warn if training changes persistent buffers of ``source``, which averages do not include."""
    persistent, buffers = source.model.state_dict(keep_vars=True), dict(average.named_buffers())
    changing = dict(source.model.named_buffers())
    for name, average_name in _names_in(buffers, changing).items():
        buffer, copy = changing[name], buffers.get(average_name)
        if name in persistent and copy is not None and not torch.equal(copy.to(buffer.device), buffer):
            if not is_silent():
                warnings.warn(
                    f"moving_average: averages include parameters only; buffers of {source.class_name} that training "
                    f"changes ({name} first) keep their values in the average. Copy them before you use the average",
                    stacklevel=5,
                )
            return


def _move_towards(target: Shard, weight: torch.Tensor, beta: float, device: torch.device | None) -> None:
    values = target.values.to(device or target.values.device)  # shares its memory if it is there already
    values.mul_(beta).add_(weight.to(values.device, values.dtype).reshape(values.shape), alpha=1 - beta)
    if values.data_ptr() != target.values.data_ptr():
        target.values.copy_(values)
