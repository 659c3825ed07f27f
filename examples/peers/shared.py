"""What the adapters share: windows of micro-batches for libraries that leave counting to the script, and epochs of data."""

from collections.abc import Iterable

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


def sampled(dataset: Dataset[torch.Tensor], batch_size: int, shuffle: bool, epoch: int) -> Iterable[torch.Tensor]:
    """This rank's batches, with PyTorch's `DistributedSampler`."""
    sampler = DistributedSampler(dataset, dist.get_world_size(), dist.get_rank(), shuffle=shuffle, seed=0)
    sampler.set_epoch(epoch)
    return DataLoader(dataset, batch_size, sampler=sampler)
