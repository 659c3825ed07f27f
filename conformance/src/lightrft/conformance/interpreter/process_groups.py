"""A process group that a script creates before it creates a strategy."""

import itertools
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

_groups = itertools.count()
TIMEOUT = timedelta(seconds=60)


def join() -> None:
    """Join the group of all workers, or create a group of size 1."""
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        return
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    prefixed = PrefixStore(f"script/{next(_groups)}", store)
    dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size, timeout=TIMEOUT)
