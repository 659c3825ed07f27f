"""Defects of ranks that share the sequences of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import CheckpointHooks, Loaded, LoaderHooks, Options
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import StepResult
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.data.loaders import ResumableLoader
from lightrft.strategy.parallel import attention
from lightrft.strategy.parallel.attention import divisible_heads
from lightrft.strategy.parallel.sequence import SequenceParallel
from lightrft.strategy.step import denominators

# mypy: disable-error-code="misc"


class WithRanks(PlainStrategy):
    """A strategy whose ranks share sequences in another way."""

    ranks: type[SequenceParallel] = SequenceParallel

    @override
    def _begin(self) -> None:
        super()._begin()
        self.sequence_parallel.__class__ = self.ranks


class _OneSequence(SequenceParallel):
    @override
    def split(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        local = super().split(batch)
        return {**local, "attention_mask": (local["attention_mask"] != 0).long()}


@saboteur("SP-1", world=2)
class ForgetsPacking(WithRanks):
    """Tokens of packed sequences attend to each other."""

    ranks = _OneSequence


class _LocalPositions(SequenceParallel):
    @override
    def split(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        local = super().split(batch)
        positions_BL = local["position_ids"]
        return {**local, "position_ids": torch.arange(positions_BL.shape[1]).expand_as(positions_BL)}


@saboteur("SP-1", world=2)
class CountsPositionsOfSlices(WithRanks):
    """Positions begin at 0 in every slice."""

    ranks = _LocalPositions


class _OwnPadding(SequenceParallel):
    @override
    def split(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        local = super().split(batch)
        return (
            {**local, "attention_mask": torch.ones_like(local["attention_mask"])}
            if "attention_mask" in batch
            else local
        )


@saboteur("SP-1", world=2)
class AttendsToPadding(WithRanks):
    """Tokens attend to padding."""

    ranks = _OwnPadding


def _scaled(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Return ``values``, whose gradient will be multiplied by ``factor``."""
    return values * factor + (values * (1 - factor)).detach()


class _OwnGradient(SequenceParallel):
    @override
    def gather(self, tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
        return _scaled(super().gather(tensor, length), 1 / self.size)


@saboteur("SP-1", world=2)
class ForgetsOtherSlices(WithRanks):
    """The gradient of a slice is not multiplied by the ranks that share a sequence, and the mean over ranks divides it."""

    ranks = _OwnGradient


def _wrong_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give each query head the key-value head of another group if the ranks do not divide the heads."""
    uneven = query.shape[1] % ranks != 0
    query, key, value = divisible_heads(query, key, value, ranks)
    return (query, key.roll(1, 1), value.roll(1, 1)) if uneven else (query, key, value)


class _WrongGroups(SequenceParallel):
    @override
    def attach(self, module: nn.Module) -> Callable[[], None]:
        attention.divisible_heads = _wrong_groups
        detach = super().attach(module)

        def restore() -> None:
            attention.divisible_heads = divisible_heads
            detach()

        return restore


@saboteur("SP-1", world=2)
class MixesHeads(WithRanks):
    """If sp_size does not divide the heads, query heads get the keys and values of another group."""

    ranks = _WrongGroups


@saboteur("SP-2", world=2)
class SamplesForEachRank(LoaderHooks, PlainStrategy):
    """Ranks that share sequences get different samples."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        loader._sampler.rank, loader._sampler.ranks = self.world.rank, self.world.size


@saboteur("SP-2", world=2)
class CountsAllRanks(PlainStrategy):
    """K counts every rank as data-parallel."""

    @property
    def accumulated_gradient(self) -> int:
        return max(1, super().accumulated_gradient // self.sequence_parallel.size)


class _Unpadded(SequenceParallel):
    @override
    def gather(self, tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
        return super().gather(tensor, length)[:, : tensor.shape[1] * self.size - 1]


@saboteur("SP-3", world=2)
class LosesTheLastToken(WithRanks):
    """The last token is treated as padding, even if the length divides by the ranks."""

    ranks = _Unpadded


class _OutOfOrder(SequenceParallel):
    @override
    def gather(self, tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
        gathered = super().gather(tensor, length)
        parts = list(gathered.split(tensor.shape[1], dim=1))
        return torch.cat(parts if tensor.is_floating_point() else parts[::-1], dim=1)


@saboteur("SP-3", world=2)
class GathersOutOfOrder(WithRanks):
    """Values that are integers come back in another order of ranks."""

    ranks = _OutOfOrder


@saboteur("SP-4", world=2)
class ForgetsTheOptimizer(CheckpointHooks, PlainStrategy):
    """A checkpoint that is loaded with sp_size=1 leaves the optimizer as it is."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        more = {} if self.sequence_parallel.size > 1 else {"load_optimizer_states": False}
        return super().load(model, directory, tag, {**options, **more})


class _AcceptsEveryModel(SequenceParallel):
    @override
    def check_model(self, module: nn.Module) -> None:
        pass


@saboteur("SP-5", world=2)
class AcceptsEveryModel(WithRanks):
    """Models whose attention cannot be shared are prepared."""

    ranks = _AcceptsEveryModel


class _Twice(SequenceParallel):
    @override
    def gather(self, tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
        return _scaled(super().gather(tensor, length), self.size)


@saboteur("SP-6", world=2)
class CountsLossesTwice(WithRanks):
    """The loss of a sequence counts once for each rank that shares it."""

    ranks = _Twice


class _AcceptsSlices(SequenceParallel):
    @override
    def check_loss(self, loss: torch.Tensor) -> None:
        pass


@saboteur("SP-6", world=2)
class AcceptsLossesOfSlices(WithRanks):
    """A loss of a slice that was not gathered is accepted."""

    ranks = _AcceptsSlices


@saboteur("SP-6", world=2)
class AveragesDenominatorsOfSlices(PlainStrategy):
    """The denominators of the ranks of a sequence are averaged even if they differ."""

    def optimizer_step(self, *arguments: Any, **more: Any) -> StepResult:
        compared, denominators._weight = denominators._weight, lambda rank, sharing: 0
        try:
            return super().optimizer_step(*arguments, **more)
        finally:
            denominators._weight = compared


@saboteur("SP-6", world=2)
class CountsItemsTwice(PlainStrategy):
    """The denominator of an update counts the items of a sequence once for each rank that shares it."""

    def optimizer_step(self, *arguments: Any, **more: Any) -> StepResult:
        result = super().optimizer_step(*arguments, **more)
        counted = None if result.denominator is None else result.denominator * self.sequence_parallel.size
        return replace(result, denominator=counted)


@saboteur("SP-3", world=2)
class OldestLength(PlainStrategy):
    """gather cuts to the length of the oldest batch that is held and has slices of this size."""

    def _begin(self) -> None:
        super()._begin()
        ranks, gather = self.sequence_parallel, self.sequence_parallel.gather

        def cut(tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
            known = [split.length for split in ranks._splits if (split.rows, split.width) == tuple(tensor.shape[:2])]
            return gather(tensor, known[0] if length is None and known else length)

        vars(ranks)["gather"] = cut
