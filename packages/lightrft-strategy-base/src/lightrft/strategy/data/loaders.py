"""Data loaders: which rank gets which sample, in which order, and resuming in the middle of an epoch.

The order of an epoch depends only on the seed and the epoch. The samples after ``consumed_samples``, counted over all ranks,
are distributed round-robin: rank r takes every world-size-th sample from the r-th on. So a run can continue with another
number of ranks, with the same remaining samples in the same order.

torchdata's StatefulDataLoader restores the state of each worker of each rank, and so cannot change the number of ranks; here
the position is one number.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.config.validation import shown
from lightrft.strategy.compat import recognised_by_lightrft


class ElasticSampler(Sampler[int]):
    """One rank's share of an epoch, from ``consumed_samples`` on.

    With ``drop_last`` the remaining samples are cut to a multiple of the number of ranks; without, the first samples of the
    epoch are repeated to fill the last round, fewer than there are ranks.
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
                raise ArgumentError(
                    f"position of the loader: expected {name} to be an integer of at least 0, got {name}={value!r}"
                )
        if consumed_samples > self.length:
            raise ArgumentError(
                f"position of the loader: expected consumed_samples to be at most the {self.length} samples of an epoch, got "
                f"{consumed_samples}. Count from the start of the epoch, and pass the epoch to set_epoch"
            )
        self.epoch, self.consumed_samples = epoch, consumed_samples

    def order(self) -> list[int]:
        """Return the indices of the whole epoch, for all ranks together."""
        if not self.shuffle:
            return list(range(self.length))
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        remaining = order[self.consumed_samples :]
        if self.drop_last:
            remaining = remaining[: len(remaining) - len(remaining) % self.ranks]
        else:
            missing = -len(remaining) % self.ranks
            remaining += (order * self.ranks)[:missing]
        return iter(remaining[self.rank :: self.ranks])

    def __len__(self) -> int:
        remaining = self.length - self.consumed_samples
        return remaining // self.ranks if self.drop_last else -(-remaining // self.ranks)


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` that knows its position: the samples that it has yielded in this epoch, over all ranks.

    Samples that workers have only prefetched do not count. Checkpoints store the position, so that this loop continues where
    the saved one stood, also with another batch size or number of ranks::

        for epoch in range(loader.epoch, epochs):
            loader.set_epoch(epoch)
            for batch in loader:
                ...
    """

    def __init__(self, dataset: Dataset[Any], sampler: ElasticSampler, **settings: Any) -> None:
        super().__init__(dataset, sampler=sampler, **settings)
        self._sampler = sampler
        self._yielded = 0

    @property
    def epoch(self) -> int:
        """The current epoch, or the next one after the last batch."""
        return self._sampler.epoch

    @property
    def consumed_samples(self) -> int:
        """Samples of this epoch that were yielded, over all ranks."""
        return min(self._sampler.length, self._sampler.consumed_samples + self._yielded * self._sampler.ranks)

    def set_epoch(self, epoch: int, consumed_samples: int | None = None) -> None:
        """Go to a position; takes effect when iteration begins.

        Args:
            epoch: The epoch.
            consumed_samples: Samples to skip, over all ranks. Default: the current position in the current epoch, 0 in
                another.
        """
        if consumed_samples is None:
            consumed_samples = self.consumed_samples if epoch == self.epoch else 0
        self._sampler.set_epoch(epoch, consumed_samples)
        self._yielded = 0

    def order(self) -> dict[str, Any]:
        """Return what the batches at a position depend on: JSON values, equal on all ranks."""
        sampler = self._sampler
        return {
            "samples": sampler.length, "shuffle": sampler.shuffle, "seed": sampler.seed if sampler.shuffle else None,
            "drop_last": sampler.drop_last, "ranks": sampler.ranks, "batch_size": self.batch_size,
        }  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """Return the position, equal on all ranks."""
        return {"epoch": self.epoch, "consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position of `state_dict`, of any number of ranks."""
        missing = {"epoch", "consumed_samples"} - state.keys()
        if missing:
            raise ArgumentError(
                f"load_state_dict: expected a position with epoch and consumed_samples, got one without "
                f"{' and '.join(sorted(missing))}. Pass what state_dict returned"
            )
        self.set_epoch(state["epoch"], state["consumed_samples"])

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield this rank's batches from the position on. After the last one, the position is the start of the next epoch.

        An interrupted iteration starts again from its first position.
        """
        self._yielded = 0
        share, batch_size = len(self._sampler), self.batch_size or 1
        for batch in super().__iter__():
            self._yielded = min(share, self._yielded + batch_size)
            yield batch
        self.set_epoch(self.epoch + 1, 0)


def make_loader(
    dataset: Any, batch_size: int, *, rank: int, ranks: int, seed: int, shuffle: bool, drop_last: bool,
    sampler: Sampler[int] | None, consumed_samples: int, collate_fn: Callable[[list[Any]], Any] | None, pin_memory: bool,
) -> DataLoader[Any]:  # fmt: skip
    """Return the loader of one rank; a plain `DataLoader` if the caller passes a ``sampler``."""
    if isinstance(dataset, type) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ArgumentError(
            f"setup_dataloader: expected a dataset with a length, got {type(dataset).__name__}. Pass a map-style dataset"
        )
    if not (sampler is None or hasattr(sampler, "__iter__")):
        raise ArgumentTypeError(f"setup_dataloader: expected a sampler of indices or None, got {shown(sampler)}")
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "drop_last": drop_last,
        "collate_fn": collate_fn,
        "pin_memory": pin_memory,
    }
    if sampler is not None:
        if consumed_samples:
            raise ArgumentError(
                "setup_dataloader: expected consumed_samples or sampler, got both. Skip the samples in your own sampler"
            )
        return DataLoader(dataset, sampler=sampler, **settings)
    elastic = ElasticSampler(
        len(dataset), rank=rank, ranks=ranks, shuffle=shuffle, seed=seed, drop_last=drop_last,
        consumed_samples=consumed_samples,
    )  # fmt: skip
    recognised_by_lightrft(elastic)
    return ResumableLoader(dataset, elastic, **settings)
