"""Feeding the ranks: who sees which sample, in which order, and going on where a run stopped.

The order of an epoch depends on the seed and the epoch alone. What is left of it after ``consumed_samples``,
counted over all ranks, is dealt out one by one: rank r takes every world-size-th sample from the r-th on. So
a run may go on with another number of ranks, and the samples left are the same, in the same order.

torchdata's StatefulDataLoader restores what each worker of each rank had been doing, and so cannot change the
number of ranks; here the position is one number.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightrft.config import ArgumentError


class ElasticSampler(Sampler[int]):
    """One rank's share of an epoch, from ``consumed_samples`` on.

    With ``drop_last`` the samples left are cut to a multiple of the ranks; without, the first of the epoch
    are seen again to fill up the last round, at most one less than there are ranks.
    """

    def __init__(
        self,
        length: int,
        *,
        rank: int,
        ranks: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        consumed_samples: int = 0,
    ) -> None:
        self.length, self.rank, self.ranks = length, rank, ranks
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.set_epoch(0, consumed_samples)

    def set_epoch(self, epoch: int, consumed_samples: int = 0) -> None:
        """Go to ``consumed_samples`` of ``epoch``."""
        for name, value in (("epoch", epoch), ("consumed_samples", consumed_samples)):
            if not isinstance(value, int) or value < 0:
                raise ArgumentError(f"position of the data: {name}={value!r}; allowed is an integer >= 0")
        if consumed_samples > self.length:
            raise ArgumentError(
                f"position of the data: consumed_samples={consumed_samples} is not within the {self.length} samples of an "
                f"epoch; count from the start of the epoch, and name the epoch with set_epoch"
            )
        self.epoch, self.consumed_samples = epoch, consumed_samples

    def order(self) -> list[int]:
        """The whole epoch, for all ranks together."""
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        left = order[self.consumed_samples :]
        if self.drop_last:
            left = left[: len(left) - len(left) % self.ranks]
        else:
            missing = -len(left) % self.ranks
            left += (order * self.ranks)[:missing]
        return iter(left[self.rank :: self.ranks])

    def __len__(self) -> int:
        left = self.length - self.consumed_samples
        return left // self.ranks if self.drop_last else -(-left // self.ranks)


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` that knows how many samples, over all ranks, it has handed out in this epoch.

    The position counts what was handed out, whatever workers have read ahead. It is in checkpoints, so that this loop
    goes on where a loaded one stood::

        for epoch in range(loader.epoch, epochs):
            loader.set_epoch(epoch)
            for batch in loader:
                ...
    """

    def __init__(self, dataset: Dataset[Any], sampler: ElasticSampler, **settings: Any) -> None:
        super().__init__(dataset, sampler=sampler, **settings)
        self._elastic = sampler
        self._handed_out = 0

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one where the last batch of one was handed out."""
        return self._elastic.epoch

    @property
    def consumed_samples(self) -> int:
        """Samples of this epoch that were handed out, over all ranks."""
        return min(self._elastic.length, self._elastic.consumed_samples + self._handed_out * self._elastic.ranks)

    def set_epoch(self, epoch: int, consumed_samples: int | None = None) -> None:
        """Go to ``consumed_samples`` of ``epoch``; takes effect when iteration begins.

        Without ``consumed_samples``: stay where it is in the epoch under way, or go to the beginning of another.
        """
        if consumed_samples is None:
            consumed_samples = self.consumed_samples if epoch == self.epoch else 0
        self._elastic.set_epoch(epoch, consumed_samples)
        self._handed_out = 0

    def order(self) -> dict[str, Any]:
        """What decides which samples come at a position: JSON values, equal on all ranks."""
        own = self._elastic
        return {
            "samples": own.length, "shuffle": own.shuffle, "seed": own.seed if own.shuffle else None,
            "drop_last": own.drop_last, "ranks": own.ranks, "batch_size": self.batch_size,
        }  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """The position, equal on all ranks."""
        return {"epoch": self.epoch, "consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that `state_dict` gave, with whatever number of ranks."""
        missing = {"epoch", "consumed_samples"} - state.keys()
        if missing:
            raise ArgumentError(f"load_state_dict: the position of the data has no {' and no '.join(sorted(missing))}")
        self.set_epoch(state["epoch"], state["consumed_samples"])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """This rank's batches from the position on. After the last one the position is the next epoch's start.

        An iteration that is broken off begins again where it began.
        """
        self._handed_out = 0
        share, batch_size = len(self._elastic), self.batch_size or 1
        for batch in super().__iter__():
            self._handed_out = min(share, self._handed_out + batch_size)
            yield batch
        self.set_epoch(self.epoch + 1, 0)


def make_loader(
    dataset: Any, batch_size: int, *, rank: int, ranks: int, seed: int, shuffle: bool, drop_last: bool,
    sampler: Sampler[int] | None, consumed_samples: int, collate_fn: Callable[[list[Any]], Any] | None, pin_memory: bool,
) -> DataLoader[Any]:  # fmt: skip
    """The loader of one rank; with a ``sampler`` of the caller's own, a plain one."""
    if not hasattr(dataset, "__len__"):
        raise ArgumentError(f"setup_dataloader: {type(dataset).__name__} has no length; pass a map-style dataset")
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "drop_last": drop_last,
        "collate_fn": collate_fn,
        "pin_memory": pin_memory,
    }
    if sampler is not None:
        if consumed_samples:
            raise ArgumentError(
                "setup_dataloader: consumed_samples is for the sampler made here, and you passed your own"
            )
        return DataLoader(dataset, sampler=sampler, **settings)
    own = ElasticSampler(
        len(dataset), rank=rank, ranks=ranks, shuffle=shuffle, seed=seed, drop_last=drop_last,
        consumed_samples=consumed_samples,
    )  # fmt: skip
    return ResumableLoader(dataset, own, **settings)
