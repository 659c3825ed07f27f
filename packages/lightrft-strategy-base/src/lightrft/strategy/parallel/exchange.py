"""Exchanges within the ranks that share a sequence, with gradients, and the check that a loss uses them.

Ulysses attention (https://arxiv.org/abs/2309.14509) needs one kind of exchange: all-to-all, from slices of the sequence
with all heads to the whole sequence with a part of the heads, and back. A loss needs another: `gather`, from each rank's
slice of per-token values to the whole sequence on every rank.

In names of dimensions: N ranks, B sequences, S tokens of a sequence, L = S / N tokens of a slice, H heads, D head size.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from lightrft.config import StrategyError
from lightrft.strategy.distributed.world import all_gather_rows
from lightrft.strategy.tensors import grouped


def all_to_all(
    tensors: Sequence[torch.Tensor], *, scatter: int, gather: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """Split dimension ``scatter`` of each tensor over the ranks, and concatenate dimension ``gather`` from them.

    All ranks of ``group`` must call this, with the same shapes. Tensors of one dtype travel in one collective. The
    backward pass is the reverse exchange.

    Args:
        tensors: For example (B, H, L, D) with ``scatter=1`` and ``gather=2``; H is a multiple of N.
        scatter: The dimension that is divided over the ranks.
        gather: The dimension that becomes whole.
        group: The ranks.

    Returns:
        For example (B, H / N, S, D).
    """
    exchanged: tuple[torch.Tensor, ...] = _AllToAll.apply(group, scatter, gather, *tensors)  # type: ignore[no-untyped-call]
    return exchanged


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, scatter: int, gather: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.scatter, ctx.gather = group, scatter, gather
        return _exchange(tensors, scatter, gather, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *_exchange(gradients, ctx.gather, ctx.scatter, ctx.group)


def _exchange(
    tensors: Sequence[torch.Tensor], scatter: int, gather: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    ranks = dist.get_world_size(group)
    received: dict[int, torch.Tensor] = {}
    for same_dtype in grouped((tensor.dtype, index) for index, tensor in enumerate(tensors)).values():
        parts = [tensors[index].unflatten(scatter, (ranks, -1)).movedim(scatter, 0) for index in same_dtype]
        sent = torch.cat([part.reshape(ranks, -1) for part in parts], dim=1)
        exchanged = torch.empty_like(sent)
        dist.all_to_all_single(exchanged, sent, group=group)
        columns = exchanged.split([part[0].numel() for part in parts], dim=1)
        for index, part, values in zip(same_dtype, parts, columns, strict=True):
            received[index] = values.reshape(part.shape).movedim(0, gather).flatten(gather, gather + 1)
    return tuple(received[index] for index in range(len(tensors)))


def gather(values_BL: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return each rank's slice of per-token values as one tensor on every rank, in order, without padding.

    All ranks of ``group`` must call this. The gradient of a slice is the sum over the ranks of their gradients of it: every
    rank computes the loss of the whole sequence, and the factor N cancels against the mean over all ranks.

    Args:
        values_BL: (B, L, ...), of the same shape and dtype on every rank.
        length: S, the tokens of a sequence without padding; at most L x N.
        group: The ranks, in the order of their slices.

    Returns:
        (B, S, ...).
    """
    gathered: torch.Tensor = _Gather.apply(values_BL, length, group)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_BL: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.width = group, values_BL.shape[1]
        sent = values_BL.byte() if values_BL.dtype is torch.bool else values_BL  # gloo has no bool
        rows_NX = sent.new_empty(dist.get_world_size(group), sent.numel())
        rows_NX[dist.get_rank(group)] = sent.reshape(-1)
        all_gather_rows(rows_NX, group)
        whole_BS = rows_NX.view(-1, *sent.shape).movedim(0, 1).flatten(1, 2)
        return whole_BS[:, :length].to(values_BL.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BS: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        padded_BS = gradient_BS.new_zeros(len(gradient_BS), ranks * ctx.width, *gradient_BS.shape[2:])
        padded_BS[:, : gradient_BS.shape[1]] = gradient_BS
        dist.all_reduce(padded_BS, group=ctx.group)
        return padded_BS[:, rank * ctx.width : (rank + 1) * ctx.width].contiguous(), None, None


OWN_NODES = frozenset({"_AllToAllBackward", "_GatherBackward"})
"""Class names of these functions in the graph of a loss."""


_SLICE = "lightrft: a slice of a sequence"


def mark_slices(outputs: Mapping[str, object]) -> None:
    """Mark the outputs of a model for a slice in the graph, for `check_gathered`."""
    for value in outputs.values():
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            node: Any = value.grad_fn
            node.metadata[_SLICE] = True


def check_gathered(loss: torch.Tensor) -> None:
    """Raise `StrategyError` if ``loss`` was computed from a slice of the sequence that was not gathered.

    Its gradient would lack the other slices, or give them a weight that the mean over ranks does not expect. Arguments
    that are not tensors with a graph are accepted. The search ends at what was gathered, so it is short for a correct loss.
    """
    pending: deque[FunctionCtx] = deque(filter(None, [getattr(loss, "grad_fn", None)]))
    seen = set(pending)
    while pending:
        node: Any = pending.popleft()
        name = type(node).__name__
        if name == "_GatherBackward":
            continue
        if name == "_AllToAllBackward" or _SLICE in node.metadata:
            raise StrategyError(
                "backward: expected a loss of whole sequences, got one that uses a slice which was not gathered. Compute "
                "per-token values from the outputs of the model, and the loss from strategy.sequence_parallel.gather(values)"
            )
        inputs = [function for function, _ in node.next_functions if function is not None and function not in seen]
        seen.update(inputs)
        pending.extend(inputs)
