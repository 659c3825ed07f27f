"""Defects of the data loader."""

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.training.data import ElasticSampler, ResumableLoader

# mypy: disable-error-code="misc"


def with_sampler(loader: Any, kind: type[ElasticSampler]) -> Any:
    """``loader`` with its sampler turned into a ``kind``."""
    if isinstance(loader, ResumableLoader):
        loader._elastic.__class__ = kind
    return loader


class Odd(FakeStrategy):
    """A strategy with a sampler of its own."""

    sampler: type[ElasticSampler] = ElasticSampler

    def setup_dataloader(self, *arguments: Any, **more: Any) -> Any:
        return with_sampler(super().setup_dataloader(*arguments, **more), self.sampler)


class _DropsOne(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        return iter([indices[0] if index == 7 else index for index in indices])


@saboteur("DATA-1")
class DropsASample(Odd):
    """One sample is never seen; another is seen twice."""

    sampler = _DropsOne


class _PadsARound(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        return iter(indices if self.drop_last else indices + indices[:1])

    @override
    def __len__(self) -> int:
        return super().__len__() + (0 if self.drop_last else 1)


@saboteur("DATA-1")
class PadsTooMuch(Odd):
    """More is repeated than is needed."""

    sampler = _PadsARound


class _Contiguous(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[: len(self)])


@saboteur("DATA-1", world=2)
class AllTheSame(PlainStrategy):
    """Every rank sees the same samples."""

    def setup_dataloader(self, *arguments: Any, **more: Any) -> Any:
        return with_sampler(super().setup_dataloader(*arguments, **more), _Contiguous)


class _OffByOne(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        if self.consumed_samples:
            self.consumed_samples = max(0, self.consumed_samples - 1)
        return super().__iter__()


@saboteur("DATA-2")
class RepeatsOne(Odd):
    """Resuming repeats a sample."""

    sampler = _OffByOne


class _ShufflesAgain(ElasticSampler):
    @override
    def order(self) -> list[int]:
        order = super().order()
        return (
            order[: self.consumed_samples] + order[: self.consumed_samples - 1 : -1] if self.consumed_samples else order
        )


@saboteur("DATA-2")
class AnotherOrder(Odd):
    """Resuming gives the samples that were left in another order."""

    sampler = _ShufflesAgain


class _Global(ElasticSampler):
    @override
    def order(self) -> list[int]:
        return torch.randperm(self.length).tolist() if self.shuffle else super().order()


@saboteur("DATA-3")
class GlobalStream(Odd):
    """The order follows torch's global stream."""

    sampler = _Global


class _OneOrder(ElasticSampler):
    @override
    def order(self) -> list[int]:
        epoch, self.epoch = self.epoch, 0
        try:
            return super().order()
        finally:
            self.epoch = epoch


@saboteur("DATA-3")
class OneOrder(Odd):
    """All epochs have the same order."""

    sampler = _OneOrder
