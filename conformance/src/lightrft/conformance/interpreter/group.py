"""A process group that a script makes for itself, before it makes a strategy."""

import itertools
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

_made = itertools.count()
LIMIT = timedelta(seconds=60)


def join() -> None:
    """Join the group of all workers, or make a group of one."""
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1, timeout=LIMIT)
        return
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=LIMIT)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = PrefixStore(f"script/{next(_made)}", store)
    dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=LIMIT)
