"""The gradient of one update: its global norm, and the factor that clips it.

Pure functions over tensors. A gradient may lie in several sets of shards, each spread over the ranks of one
process group (FSDP2 meshes, for example); every element counts once in the norm, whoever holds it.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import BackwardCFunction

from lightrft.config import StrategyError


@dataclass(frozen=True, kw_only=True)
class GradientShards:
    """Gradients of which this rank holds a part."""

    tensors: Sequence[torch.Tensor]
    group: dist.ProcessGroup | None = None
    """The ranks that hold the other parts; None where this rank holds all of it."""


def leads_to(loss: torch.Tensor, parameters: Collection[int], transparent: Collection[str] = ()) -> bool:
    """Whether the graph of ``loss`` leads to one of ``parameters``, given by their ``id``, as far as can be seen.

    Behind a function of somebody's own, such as one that checkpoints activations, may be anything; but for those whose
    classes are called one of ``transparent``, through which the graph goes on. Breadth first: the last layers are near.
    """
    if id(loss) in parameters:
        return True
    pending: deque[Any] = deque([] if loss.grad_fn is None else [loss.grad_fn])
    seen = set(pending)
    while pending:
        node = pending.popleft()
        if id(getattr(node, "variable", None)) in parameters:
            return True
        if isinstance(node, BackwardCFunction) and type(node).__name__ not in transparent:
            return True
        following = [it for it, _ in node.next_functions if it is not None and it not in seen]
        seen.update(following)
        pending.extend(following)
    return False


def fill_missing(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give a zero gradient to parameters that got none, and none to those that were frozen meanwhile.

    A parameter that no rank used has a zero gradient, so that its moments and its weight decay move: ZeRO
    does it so by construction, and all strategies must do the same.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def require_some(parameters: Sequence[torch.nn.Parameter], kind: str) -> None:
    """Raise `StrategyError` where no parameter of a model of class ``kind`` has a gradient, whatever backward was given."""
    if all(parameter.grad is None for parameter in parameters):
        raise StrategyError(
            f"optimizer_step: no parameter of {kind} has a gradient, although backward was called; the loss was another "
            f"model's, or depends on no parameter"
        )


def global_norm(shards: Sequence[GradientShards]) -> torch.Tensor:
    """2-norm over all elements of all shards on all ranks, fp32, 0-dim; equal on every rank of the groups.

    Every rank of the groups calls it. Infinite where the square exceeds fp32, as in DeepSpeed: a gradient
    that large counts as non-finite, also where each of its elements is finite.
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
    """What a gradient of ``norm`` is multiplied by: ``min(1, max_norm / (norm + 1e-6))``, as in torch.

    ``max_norm`` None or 0 means no clipping.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def scale(shards: Sequence[GradientShards], factor: float) -> None:
    """Multiply every gradient in place; a factor of 1 leaves every bit."""
    if factor != 1.0:
        for part in shards:
            if part.tensors:
                torch._foreach_mul_(list(part.tensors), factor)
