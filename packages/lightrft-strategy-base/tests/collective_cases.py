"""What a rank does in `test_collectives`."""

import os
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from lightrft.strategy import StrategyBase

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class Plain(StrategyBase):
    """Plain data parallelism."""

    name = "plain"


def metrics(count: int) -> tuple[list[str], Any]:
    """The collectives of reducing a dict of numbers, and the result."""
    rank = int(os.environ["RANK"])
    return _collectives_of("all_reduce", {f"metric {index}": float(index + rank) for index in range(count)})


def rows(count: int) -> tuple[list[str], list[float]]:
    """The collectives of gathering ``count`` numbers and, on rank 1, one more, and the result."""
    rank = int(os.environ["RANK"])
    made, gathered = _collectives_of("all_gather", torch.full((count + rank,), float(rank)))
    return made, gathered.tolist()


def _collectives_of(call: str, data: Any) -> tuple[list[str], Any]:
    made: list[str] = []

    def noted(name: str, plain: Any, *arguments: Any, **more: Any) -> Any:
        made.append(name)
        return plain(*arguments, **more)

    with Plain(device="cpu", bf16=False, train_batch_size=2) as strategy, ExitStack() as stack:
        for name in (GATHER, "all_gather", "all_reduce"):
            stack.enter_context(patch.object(dist, name, partial(noted, name, getattr(dist, name))))
        return made, getattr(strategy, call)(data)
