"""Exponential moving averages of a trained model's weights, kept in a model of their own."""

from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightrft.config import ArgumentError
from lightrft.strategy.backend import Backend
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.shards import Shard
from lightrft.strategy.training.optimizers import trainable
from lightrft.strategy.training.trained_model import TrainedModel


class MovingAverages:
    """The averages of one strategy. An average moves once for each call that follows an applied update."""

    def __init__(self, backend: Backend, collectives: Collectives) -> None:
        self._backend, self._collectives = backend, collectives
        self._seen: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        """Updates of its source that each average has seen."""

    def seen(self, average: nn.Module) -> int | None:
        """Updates of its source that ``average`` has seen; None for a model that is no average."""
        return self._seen.get(average)

    def set_seen(self, average: nn.Module, updates: int | None) -> None:
        """Go on from what `seen` said."""
        self._seen.pop(average, None)
        if updates is not None:
            self._seen[average] = updates

    @torch.no_grad()
    def move(self, source: TrainedModel, average: nn.Module, beta: float, device: torch.device | None) -> None:
        """``average = beta * average + (1 - beta) * source``, in the type in which the average is kept.

        ``average`` is unwrapped, and has the names of the source. Computed on ``device``, by default where the
        average lives. Every rank calls this.
        """
        if not 0 <= beta < 1:
            raise ArgumentError(f"moving_average: beta={beta!r}; allowed is >= 0 and < 1")
        if self._seen.get(average, 0) == source.updates:
            return
        self._backend._settle(source.model)
        self._backend._settle(average)
        weights = trainable(source.model)
        targets = {shard.name: shard for shard in self._backend._shards(average)}
        unknown = [name for name in weights if name not in dict(average.named_parameters())]
        if unknown:
            raise ArgumentError(
                f"moving_average: the average has no {unknown[0]}; make it as a copy of the model it averages"
            )
        self._seen[average] = source.updates
        own = {shard.name: shard for shard in self._backend._shards(source.model)}
        if self._same_layout(own, targets, weights):
            for name in weights.keys() & targets.keys():
                _towards(targets[name], own[name].values, beta, device)
            return
        for name, weight in weights.items():
            with self._backend._gathered([weight], torch.float32) as whole:
                if name in targets:
                    _towards(targets[name], targets[name].of(whole[0]), beta, device)

    def _same_layout(self, own: dict[str, Shard], targets: dict[str, Shard], names: dict[str, nn.Parameter]) -> bool:
        """Whether on every rank the average holds the ranges that the source holds, so that nothing need travel."""
        alike = all(
            (name in own) == (name in targets) and (name not in own or own[name].range == targets[name].range)
            for name in names
        )
        return all(self._collectives.exchange("moving_average", alike))


def _towards(target: Shard, weight: torch.Tensor, beta: float, device: torch.device | None) -> None:
    values = target.values.to(device or target.values.device)  # the same memory where it is there already
    values.mul_(beta).add_(weight.to(values.device, values.dtype).reshape(values.shape), alpha=1 - beta)
    if values.data_ptr() != target.values.data_ptr():
        target.values.copy_(values)
