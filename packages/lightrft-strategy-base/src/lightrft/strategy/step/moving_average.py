"""Exponential moving averages of a trained model's weights, kept in a second model."""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightrft.config import ArgumentError
from lightrft.strategy.backend.adamw import trainable
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.types import Shard, TrainedModel
from lightrft.strategy.distributed.rank_consensus import RankConsensus


class MovingAverages:
    """The averages of one strategy. A call moves an average only if its source was updated since the last call."""

    def __init__(self, backend: Backend, consensus: RankConsensus) -> None:
        self._backend, self._consensus = backend, consensus
        self.seen: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        """By average, the number of updates of its source that it includes; checkpoints save and restore it."""

    @torch.no_grad()
    def move(self, source: TrainedModel, average: nn.Module, beta: float, device: torch.device | None) -> None:
        """Set ``average = beta * average + (1 - beta) * source``, in the dtype of the average. All ranks must call this.

        Args:
            source: The model that trains.
            average: Unwrapped, with the parameter names of ``source``.
            beta: In [0, 1).
            device: Device to compute on. Default: the device of the average.

        Raises:
            ArgumentError: ``beta`` is out of range, or ``average`` lacks a parameter of ``source``.
        """
        if not 0 <= beta < 1:
            raise ArgumentError(f"moving_average: expected beta >= 0 and < 1, got {beta!r}")
        if self.seen.get(average, 0) == source.updates:
            return
        self._backend.reshard(source.model)
        self._backend.reshard(average)
        weights = trainable(source.model)
        targets = {shard.name: shard for shard in self._backend.shards(average)}
        unknown = [name for name in weights if name not in dict(average.named_parameters())]
        if unknown:
            raise ArgumentError(
                f"moving_average: expected an average with the parameters of {source.class_name}, but the average has no "
                f"{unknown[0]}. Make it as a copy of the model that it averages"
            )
        self.seen[average] = source.updates
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
        """Return whether average and source are sharded alike on every rank, so that nothing must be gathered."""
        alike = all(
            (name in sources) == (name in targets)
            and (name not in sources or sources[name].range == targets[name].range)
            for name in names
        )
        return all(self._consensus.exchange("moving_average", alike))


def _move_towards(target: Shard, weight: torch.Tensor, beta: float, device: torch.device | None) -> None:
    values = target.values.to(device or target.values.device)  # shares its memory if it is there already
    values.mul_(beta).add_(weight.to(values.device, values.dtype).reshape(values.shape), alpha=1 - beta)
    if values.data_ptr() != target.values.data_ptr():
        target.values.copy_(values)
