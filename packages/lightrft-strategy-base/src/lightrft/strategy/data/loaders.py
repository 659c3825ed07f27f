"""Data loaders: which rank gets which sample, in which order, and resuming in the middle of an epoch.

The order of an epoch depends only on the seed and the epoch. The samples after ``consumed_samples``, counted over all ranks,
are distributed round-robin: rank r takes every world-size-th sample from the r-th on. So a run can continue with another
number of ranks, with the same remaining samples in the same order.

Each update takes the next ``train_batch_size`` samples of this order. If an epoch is a multiple of
``train_batch_size``, no micro-batch is left over at its end, and the updates do not depend on the number of ranks; see
`epoch_multiple`. An epoch that resumes within an update starts a new update there, so the rest of the epoch is a
multiple of ``train_batch_size`` too.

torchdata's StatefulDataLoader restores the state of each worker of each rank, and so cannot change the number of ranks; here
the position is one number.
"""

from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.config.validation import shown
from lightrft.strategy.compat import recognised_by_lightrft
from lightrft.strategy.telemetry.log import logger


class ElasticSampler(Sampler[int]):
    """One rank's share of an epoch, from ``consumed_samples`` on.

    With ``drop_last``, the remaining samples are cut to a multiple of ``multiple``; without it, the first samples of
    the epoch are repeated to reach one.
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
        multiple: int | None = None,
    ) -> None:
        """Create the share of ``rank``.

        Args:
            length: Number of samples in an epoch.
            rank: This rank.
            ranks: Number of ranks.
            shuffle: Whether each epoch is shuffled differently.
            seed: Seed of the order.
            drop_last: Whether to drop samples at the end, instead of repeating some.
            consumed_samples: Samples of the first epoch to skip.
            multiple: The number of samples in an epoch, over all ranks, is a multiple of this, which is a multiple of
                ``ranks``. Default: ``ranks``.
        """
        self.length, self.rank, self.ranks = length, rank, ranks
        self.multiple = multiple or ranks
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.go_to("setup_dataloader", 0, consumed_samples)

    def set_epoch(self, epoch: int, consumed_samples: int = 0) -> None:
        """Go to ``consumed_samples`` of ``epoch``."""
        self.go_to("set_epoch", epoch, consumed_samples)

    def go_to(self, call: str, epoch: int, consumed_samples: int) -> None:
        """Go to a position, for a ``call`` of the user, which errors name."""
        for name, value in (("epoch", epoch), ("consumed_samples", consumed_samples)):
            if not isinstance(value, int) or value < 0:
                raise ArgumentError(
                    f"{call}: expected {name} to be an integer of at least 0, got {name}={value!r}. Count from 0, or "
                    f"pass what state_dict returned"
                )
        if consumed_samples > self.length:
            raise ArgumentError(
                f"{call}: expected consumed_samples to be at most the {self.length} samples of an epoch, got "
                f"{consumed_samples}. Count from the start of the epoch"
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
            remaining = remaining[: len(remaining) - len(remaining) % self.multiple]
        else:
            missing = -len(remaining) % self.multiple
            remaining += islice(cycle(order), missing)
        return iter(remaining[self.rank :: self.ranks])

    def __len__(self) -> int:
        remaining = self.length - self.consumed_samples
        multiples = remaining // self.multiple if self.drop_last else -(-remaining // self.multiple)
        return multiples * self.multiple // self.ranks


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
        self._go_to("set_epoch", epoch, consumed_samples)

    def _go_to(self, call: str, epoch: int, consumed_samples: int) -> None:
        self._sampler.go_to(call, epoch, consumed_samples)
        self._yielded = 0

    def order(self) -> dict[str, Any]:
        """Return what the batches at a position depend on, except ``whole_updates``: JSON values, equal on all ranks.

        A resumed run may have another ``train_batch_size``: it starts a new update at the saved position.
        """
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
        self._go_to("load_state_dict", state["epoch"], state["consumed_samples"])

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


def epoch_multiple(
    samples: int,
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    whole_updates: bool | None,
    total: int,
    micro: int,
    ranks: int,
) -> int:
    """Return the number that the samples of an epoch must be a multiple of: ``total``, or ``ranks``.

    Args:
        samples: Size of the dataset.
        batch_size: Samples per batch on one rank.
        shuffle: Whether each epoch is shuffled differently.
        drop_last: Whether samples at the end are dropped, instead of repeating some.
        whole_updates: What the caller asked for. None: yes if the loader shuffles, has micro-batches, drops samples at the end,
            and has enough of them for an update.
        total: Samples per update, over all ranks.
        micro: Samples per micro-batch.
        ranks: Number of ranks.

    Raises:
        ArgumentError: The caller asked for whole updates, and no batches can add up to one.
    """
    share = total // ranks
    if whole_updates is None and shuffle and batch_size == micro:
        whole_updates = drop_last and samples >= total
        if samples % total:
            (_warn_of_dropped_samples if whole_updates else _warn_of_partial_update)(samples, total)
    if not whole_updates:
        return ranks
    if share % batch_size:
        raise ArgumentError(
            f"setup_dataloader: expected batch_size to divide the {share} samples of an update on one rank, for "
            f"whole_updates=True, got {batch_size}. Pass batch_size=micro_train_batch_size"
        )
    if drop_last and samples < total:
        raise ArgumentError(
            f"setup_dataloader: expected a dataset of at least train_batch_size={total} samples, for whole_updates=True and "
            f"drop_last=True, got {samples}. Pass more samples, a smaller train_batch_size, or drop_last=False to repeat samples"
        )
    if batch_size != micro:
        logger.warning(
            "setup_dataloader: with whole_updates=True, expected batches of micro_train_batch_size=%d samples, got %d. By "
            "default, optimizer_step counts %d batches to an update, which are %d samples over all ranks, not "
            "train_batch_size=%d. Pass boundary to each optimizer_step: True after every %d batches, otherwise False",
            micro, batch_size, share // micro, share // micro * batch_size * ranks, total, share // batch_size,
        )  # fmt: skip
    return total


def _warn_of_dropped_samples(samples: int, total: int) -> None:
    logger.warning(
        "setup_dataloader: each epoch drops %d of %d samples, which do not fill an update of train_batch_size=%d, because a loader "
        "that shuffles and has batches of micro_train_batch_size is treated as a training loader. Pass whole_updates=False to keep "
        "them, for prompts or evaluation; whole_updates=True to drop them without this warning", samples % total, samples, total,
    )  # fmt: skip


def _warn_of_partial_update(samples: int, total: int) -> None:
    remedy = "drop_last=True to drop them, whole_updates=True to repeat samples until the update is full"
    if samples < total:
        remedy = f"a train_batch_size of at most {samples}, whole_updates=True with drop_last=False to repeat samples"
    logger.warning(
        "setup_dataloader: an epoch of %d samples ends within an update of train_batch_size=%d. The micro-batches that are left "
        "count towards the next update, and their number depends on the number of ranks. Pass %s, or whole_updates=False if "
        "this loader is not for training", samples, total, remedy,
    )  # fmt: skip


def make_loader(
    dataset: Any, batch_size: int, *, rank: int, ranks: int, seed: int, shuffle: bool, drop_last: bool,
    sampler: Sampler[int] | None, consumed_samples: int, collate_fn: Callable[[list[Any]], Any] | None, pin_memory: bool,
    whole_updates: bool | None, total: int, micro: int,
) -> DataLoader[Any]:  # fmt: skip
    """Return the loader of one rank; a plain `DataLoader` if the caller passes a ``sampler``.

    ``total`` and ``micro`` are the samples of an update, over all ranks, and of a micro-batch.
    """
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
        if whole_updates:
            raise ArgumentError(
                "setup_dataloader: expected whole_updates or sampler, got both. Let your own sampler give each rank a multiple of "
                f"{total // ranks} samples"
            )
        return DataLoader(dataset, sampler=sampler, **settings)
    multiple = epoch_multiple(
        len(dataset), batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, whole_updates=whole_updates,
        total=total, micro=micro, ranks=ranks,
    )  # fmt: skip
    elastic = ElasticSampler(
        len(dataset), rank=rank, ranks=ranks, shuffle=shuffle, seed=seed, drop_last=drop_last,
        consumed_samples=consumed_samples, multiple=multiple,
    )  # fmt: skip
    recognised_by_lightrft(elastic)
    return ResumableLoader(dataset, elastic, **settings)
