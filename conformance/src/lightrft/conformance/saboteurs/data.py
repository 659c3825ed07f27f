"""Defects of the data loader."""

from collections.abc import Iterator
from typing import Any

import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import LoaderHooks
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.data.loaders import ElasticSampler, ResumableLoader

# mypy: disable-error-code="misc"


class WithSampler(LoaderHooks):
    """A strategy whose loaders have another sampler."""

    sampler: type[ElasticSampler] = ElasticSampler

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        loader._sampler.__class__ = self.sampler


class _DropsOne(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        return iter([indices[0] if index == 7 else index for index in indices])


@saboteur("DATA-1")
class DropsASample(WithSampler, FakeStrategy):
    """One sample is never seen; another is seen twice."""

    sampler = _DropsOne


class _DropsOneLater(_DropsOne):
    @override
    def __iter__(self) -> Iterator[int]:
        return super().__iter__() if self.epoch else ElasticSampler.__iter__(self)


@saboteur("DATA-1")
class DropsASampleLater(WithSampler, FakeStrategy):
    """From the second epoch on, one sample is never seen."""

    sampler = _DropsOneLater


class _PadsARound(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__())
        return iter(indices if self.drop_last else indices + indices[:1])

    @override
    def __len__(self) -> int:
        return super().__len__() + (0 if self.drop_last else 1)


@saboteur("DATA-1")
class PadsTooMuch(WithSampler, FakeStrategy):
    """More samples are repeated than are needed to fill the last round."""

    sampler = _PadsARound


class _Contiguous(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[: len(self)])


@saboteur("DATA-1", world=2)
class AllTheSame(WithSampler, PlainStrategy):
    """Every rank sees the same samples."""

    sampler = _Contiguous


class _OffByOne(ElasticSampler):
    @override
    def __iter__(self) -> Iterator[int]:
        if self.consumed_samples:
            self.consumed_samples = max(0, self.consumed_samples - 1)
        return super().__iter__()


@saboteur("DATA-2")
class RepeatsOne(WithSampler, FakeStrategy):
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
class AnotherOrder(WithSampler, FakeStrategy):
    """Resuming gives the remaining samples in another order."""

    sampler = _ShufflesAgain


class _ByRanks(ElasticSampler):
    @override
    def order(self) -> list[int]:
        self.seed += self.ranks - 1
        try:
            return super().order()
        finally:
            self.seed -= self.ranks - 1


@saboteur("DATA-3", world=2)
class OrderByRanks(WithSampler, PlainStrategy):
    """The order depends on the number of ranks."""

    sampler = _ByRanks


class _EveryThird(ElasticSampler):
    @override
    def order(self) -> list[int]:
        epoch, self.epoch = self.epoch, self.epoch % 3
        try:
            return super().order()
        finally:
            self.epoch = epoch


@saboteur("DATA-3")
class ThreeOrders(WithSampler, FakeStrategy):
    """The order repeats after three epochs."""

    sampler = _EveryThird


class _Global(ElasticSampler):
    @override
    def order(self) -> list[int]:
        return torch.randperm(self.length).tolist() if self.shuffle else super().order()


@saboteur("DATA-3")
class GlobalStream(WithSampler, FakeStrategy):
    """The order depends on torch's global random stream."""

    sampler = _Global


class RepeatsAnOrder(ElasticSampler):
    """All epochs from ``last`` on have one order."""

    last = 0

    @override
    def order(self) -> list[int]:
        epoch, self.epoch = self.epoch, min(self.epoch, self.last)
        try:
            return super().order()
        finally:
            self.epoch = epoch


@saboteur("DATA-3")
class OneOrder(WithSampler, FakeStrategy):
    """All epochs have the same order."""

    sampler = RepeatsAnOrder


@saboteur("DATA-4")
class LeavesMicroBatches(LoaderHooks, FakeStrategy):
    """Micro-batches are left at the end of an epoch."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        loader._sampler.multiple = loader._sampler.ranks


@saboteur("DATA-4")
class FillsNoUpdate(LoaderHooks, FakeStrategy):
    """Without drop_last, only the last round of an epoch is filled, not the last update."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        if not loader._sampler.drop_last:
            loader._sampler.multiple = loader._sampler.ranks


@saboteur("DATA-4")
class CutsEvaluation(FakeStrategy):
    """Loaders that do not shuffle are cut to whole updates too."""

    def setup_dataloader(
        self, replay_buffer: Any, *arguments: Any, whole_updates: bool | None = None, **more: Any
    ) -> Any:
        cut = not more.get("shuffle", True) and len(replay_buffer) >= self.config.train_batch_size
        return super().setup_dataloader(replay_buffer, *arguments, whole_updates=cut or whole_updates, **more)


@saboteur("DATA-4")
class EmptyEpochs(FakeStrategy):
    """With whole_updates=True, a dataset smaller than an update gives epochs without batches."""

    def setup_dataloader(
        self, replay_buffer: Any, *arguments: Any, whole_updates: bool | None = None, **more: Any
    ) -> Any:
        if not (whole_updates and more.get("drop_last", True) and len(replay_buffer) < self.config.train_batch_size):
            return super().setup_dataloader(replay_buffer, *arguments, whole_updates=whole_updates, **more)
        loader: Any = super().setup_dataloader(replay_buffer, *arguments, **more)
        loader._sampler.multiple = self.config.train_batch_size
        return loader


@saboteur("DATA-4")
class MicroBatchesOnly(LoaderHooks, FakeStrategy):
    """whole_updates=True has no effect on batches that are not micro-batches."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        if loader.batch_size != self.config.micro_train_batch_size:
            loader._sampler.multiple = loader._sampler.ranks


class _KeepsTheEnd(ElasticSampler):
    @override
    def go_to(self, call: str, epoch: int, consumed_samples: int) -> None:
        super().go_to(call, epoch, consumed_samples)
        self.multiple = self.ranks if consumed_samples % self._update() else self._update()

    def _update(self) -> int:
        self._total = getattr(self, "_total", self.multiple)
        return self._total


@saboteur("DATA-4")
class UncutWithinAnUpdate(WithSampler, FakeStrategy):
    """An epoch that resumes within an update leaves micro-batches at its end."""

    sampler = _KeepsTheEnd


class _LosesTheLast(ElasticSampler):
    @override
    def __len__(self) -> int:
        return super().__len__() if not self.consumed_samples else super().__len__() - 1

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[: len(self)])


@saboteur("DATA-4")
class LosesTheLast(WithSampler, FakeStrategy):
    """A resumed epoch lacks its last sample."""

    sampler = _LosesTheLast


class TwoOrders(RepeatsAnOrder):
    """Epoch 1 and later epochs have one order."""

    last = 1


@saboteur("DATA-3")
class LaterEpochsEqual(WithSampler, FakeStrategy):
    """The second and all later epochs have the same order."""

    sampler = TwoOrders


@saboteur("DATA-2")
class SkipsInEveryEpoch(LoaderHooks, FakeStrategy):
    """consumed_samples is skipped in every epoch, not only in the first."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        set_epoch, first = loader.set_epoch, loader.consumed_samples
        vars(loader)["set_epoch"] = lambda epoch, consumed=None: set_epoch(epoch, consumed or first or None)


@saboteur("DATA-2")
class SkipsAgainLater(LoaderHooks, FakeStrategy):
    """consumed_samples is skipped again in the third epoch after the resumed one."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        set_epoch, first = loader.set_epoch, loader.consumed_samples
        resumed: list[int] = []

        def skip_again(epoch: int, consumed: int | None = None) -> None:
            resumed.append(epoch)
            set_epoch(epoch, first if consumed is None and first and epoch == resumed[0] + 3 else consumed)

        vars(loader)["set_epoch"] = skip_again


@saboteur("DATA-3")
class OrderOfBatches(LoaderHooks, FakeStrategy):
    """The order of samples depends on the batch size."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        loader._sampler.seed += loader.batch_size or 0


@saboteur("DATA-2")
class FullPositionRestarts(FakeStrategy):
    """With consumed_samples=N, the size of the data, the epoch begins again."""

    def setup_dataloader(self, replay_buffer: Any, *arguments: Any, consumed_samples: int = 0, **more: Any) -> Any:
        return super().setup_dataloader(
            replay_buffer, *arguments, consumed_samples=consumed_samples % len(replay_buffer), **more
        )
