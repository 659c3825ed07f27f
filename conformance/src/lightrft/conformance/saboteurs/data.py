"""Defects of the data loader."""

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.data.loaders import ElasticSampler, ResumableLoader

# mypy: disable-error-code="misc"


def with_sampler(loader: Any, sampler_class: type[ElasticSampler]) -> Any:
    """Return ``loader`` with its sampler turned into a ``sampler_class``."""
    if isinstance(loader, ResumableLoader):
        loader._sampler.__class__ = sampler_class
    return loader


class WithSampler(FakeStrategy):
    """A strategy whose loaders have another sampler."""

    sampler: type[ElasticSampler] = ElasticSampler

    def setup_dataloader(self, *arguments: Any, **more: Any) -> Any:
        return with_sampler(super().setup_dataloader(*arguments, **more), self.sampler)


class _DropsOne(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        return iter([indices[0] if index == 7 else index for index in indices])


@saboteur("DATA-1")
class DropsASample(WithSampler):
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
class PadsTooMuch(WithSampler):
    """More samples are repeated than are needed to fill the last round."""

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
class RepeatsOne(WithSampler):
    """Resuming repeats one sample."""

    sampler = _OffByOne


class _ShufflesAgain(ElasticSampler):
    @override
    def order(self) -> list[int]:
        order = super().order()
        return (
            order[: self.consumed_samples] + order[: self.consumed_samples - 1 : -1] if self.consumed_samples else order
        )


@saboteur("DATA-2")
class AnotherOrder(WithSampler):
    """Resuming gives the remaining samples in another order."""

    sampler = _ShufflesAgain


class _Global(ElasticSampler):
    @override
    def order(self) -> list[int]:
        return torch.randperm(self.length).tolist() if self.shuffle else super().order()


@saboteur("DATA-3")
class GlobalStream(WithSampler):
    """The order depends on torch's global random stream."""

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
class OneOrder(WithSampler):
    """All epochs have the same order."""

    sampler = _OneOrder
