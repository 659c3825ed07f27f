"""The gradient of one update: whether a loss depends on the parameters, the global norm, and the clip factor.

Pure functions over tensors. A gradient may consist of several sets of shards, each sharded over one process group (FSDP2
meshes, for example). Every element counts once in the norm, whichever rank holds it.
"""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import BackwardCFunction

from lightrft.strategy.backend.types import GradientShards


def depends_on(loss: torch.Tensor, leaves: Collection[int], transparent: Collection[str] = ()) -> bool:
    """Return whether the graph of ``loss`` leads to one of ``leaves``, as far as the graph is visible.

    A custom autograd function, such as activation checkpointing, hides what is behind it, so it counts as leading there.
    The search is breadth-first, because the last layers are near.

    Args:
        loss: A scalar with a graph.
        leaves: The ``id`` of each tensor to look for.
        transparent: Class names of custom autograd functions behind which the graph is visible.
    """
    if id(loss) in leaves:
        return True
    pending: deque[Any] = deque([] if loss.grad_fn is None else [loss.grad_fn])
    seen = set(pending)
    while pending:
        node = pending.popleft()
        if id(getattr(node, "variable", None)) in leaves:
            return True
        if isinstance(node, BackwardCFunction) and type(node).__name__ not in transparent:
            return True
        inputs = [function for function, _ in node.next_functions if function is not None and function not in seen]
        seen.update(inputs)
        pending.extend(inputs)
    return False


def global_norm(shards: Sequence[GradientShards]) -> torch.Tensor:
    """Return the 2-norm over all elements of all shards on all ranks: fp32, 0-dim, equal on every rank of the groups.

    Every rank of the groups must call this. As in DeepSpeed, the norm is infinite if its square exceeds fp32, even if
    every element is finite.
    """
    total = sum((_squared_norm(part) for part in shards), start=torch.zeros((), dtype=torch.float64))
    return total.float().sqrt()


def _squared_norm(shards: GradientShards) -> torch.Tensor:
    norms = list(torch._foreach_norm(list(shards.tensors))) if shards.tensors else []
    device = shards.tensors[0].device if shards.tensors else torch.device("cpu")
    squared = (
        torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    )
    if shards.group is not None:
        dist.all_reduce(squared, group=shards.group)
    return squared.cpu()


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Return the factor that clips a gradient of ``norm``: ``min(1, max_norm / (norm + 1e-6))``, as in torch.

    ``max_norm`` None or 0 means no clipping.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def scale(shards: Sequence[GradientShards], factor: float) -> None:
    """Multiply every gradient by ``factor``, in place. A factor of 1 leaves it bit-identical."""
    if factor != 1.0:
        for part in shards:
            if part.tensors:
                torch._foreach_mul_(list(part.tensors), factor)
