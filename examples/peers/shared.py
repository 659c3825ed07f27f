"""What the adapters share: windows of micro-batches for libraries that leave counting to the script, and epochs of data."""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightrft.conformance.peers import LoopSettings


class Window:
    """Counts the micro-batches of one model."""

    def __init__(self, settings: LoopSettings) -> None:
        self.size, self.count, self.complete = settings.accumulation_steps, 0, False

    def begin(self) -> None:
        """Count a micro-batch; `complete` says whether it is the last of its window."""
        self.count += 1
        self.complete = self.count % self.size == 0


def sampled(
    dataset: Dataset[torch.Tensor], batch_size: int, shuffle: bool, epoch: int, consumed: int
) -> Iterable[torch.Tensor]:
    """This rank's batches, with PyTorch's `DistributedSampler`; a resumed epoch reads and drops what was consumed."""
    sampler = DistributedSampler(dataset, dist.get_world_size(), dist.get_rank(), shuffle=shuffle, seed=0)
    sampler.set_epoch(epoch)
    return islice(DataLoader(dataset, batch_size, sampler=sampler), consumed, None)


def on_first_rank(write: Callable[[], None]) -> None:
    """Write on rank 0; if that fails, every rank raises, as a careful script makes sure."""
    failure: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - told to the other ranks
            failure = [error]
    dist.broadcast_object_list(failure)
    if failure[0]:
        raise failure[0]
