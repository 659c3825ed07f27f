"""`all_reduce` and `all_gather`: tensors and numbers, in nested dicts, over all ranks.

Each call begins with one exchange of a short message per rank, over gloo. The message has a digest of the argument's schema,
and what is wrong with the argument. So a mistake on one rank raises an error on every rank, and no rank waits in a collective
that another rank never entered. A few numbers travel in the message, and every rank reduces them itself: a dict of metrics
takes one collective in all. Otherwise, one collective for each dtype and device follows.

In names of tensors, N is the number of elements, R that of ranks, and F the number of bytes in a frame: one rank's tensors,
padded to the longest.
"""

import base64
import json
from collections.abc import Callable, Hashable, Sequence
from hashlib import blake2b
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from lightrft.config import ArgumentError, ArgumentTypeError, LightRFTError
from lightrft.config.validation import shown
from lightrft.strategy.distributed.nested import Leaf, flatten, rebuild
from lightrft.strategy.distributed.rank_consensus import RankConsensus, require_equal
from lightrft.strategy.distributed.world import World
from lightrft.strategy.tensors import as_bytes, grouped

ReduceOp = Literal["mean", "sum", "max"]
ALIGNMENT = 16
"""Each tensor starts at a multiple of this many bytes in a frame."""
SMALL = 512
"""Frames of at most this many bytes travel in the first message, if they fit in it."""


class Collectives:
    """The collectives of one `World`. Every rank makes the same calls in the same order."""

    def __init__(self, world: World, consensus: RankConsensus) -> None:
        self._world, self._consensus = world, consensus

    # Data

    def all_reduce(self, data: object, op: ReduceOp = "mean") -> Any:
        """Reduce every leaf of ``data`` over the ranks; see `StrategyBase.all_reduce`."""
        call = f"all_reduce {op}" if isinstance(op, str) else "all_reduce"
        leaves, messages = self._agreed(call, data, lambda leaf: _check_reducible(leaf, op), first_dim=0)
        frames_RF, spans = _frames_in(messages), _spans(leaves)
        reduced: dict[int, torch.Tensor | float] = {}
        for group in _grouped(leaves, lambda leaf: (leaf.tensor.device, _working_dtype(leaf, op))):
            dtype, tensors = _working_dtype(leaves[group[0]], op), [leaves[index].tensor for index in group]
            if frames_RF is not None:
                rows = [frames_RF[:, spans[index]].contiguous().view(leaves[index].tensor.dtype) for index in group]
                buffer_N = _reduce_rows(torch.cat([row_RN.to(dtype) for row_RN in rows], dim=1), op)
            else:
                buffer_N = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
                if self._world.size > 1:
                    buffer_N = self._reduce(buffer_N, op)
            if op == "mean":
                buffer_N /= self._world.size
            for index, values in zip(group, buffer_N.split([tensor.numel() for tensor in tensors]), strict=True):
                reduced[index] = _result(leaves[index], values, op)
        return rebuild(data, (reduced[index] for index in range(len(leaves))))

    def all_gather(self, data: object) -> Any:
        """Concatenate every leaf of ``data`` over the ranks; see `StrategyBase.all_gather`."""
        leaves, messages = self._agreed("all_gather", data, lambda leaf: None, first_dim=1)
        frames_RF = _frames_in(messages)
        gathered: dict[int, torch.Tensor] = {}
        order = _canonical(leaves)
        for group in _grouped(leaves, lambda leaf: leaf.tensor.device):
            rows = [[message["rows"][order.index(index)] for index in group] for message in messages]
            tensors = [_with_rows(leaves[index].tensor) for index in group]
            parts = [tensors] if self._world.size == 1 else self._gather(tensors, rows, frames_RF)
            for position, index in enumerate(group):
                gathered[index] = torch.cat([rank_parts[position] for rank_parts in parts])
        return rebuild(data, (gathered[index] for index in range(len(leaves))))

    def _agreed(
        self, call: str, data: object, check: Callable[[Leaf], None], first_dim: int
    ) -> tuple[list[Leaf], list[dict[str, Any]]]:
        """Return the leaves of ``data``, and every rank's message, once all ranks pass leaves of the same schema."""
        leaves: list[Leaf] = []
        message: dict[str, Any] = {}
        schema: list[list[object]] = []
        with self._consensus.together(call, report=lambda: message) as messages:
            try:
                leaves += flatten(data)
                for leaf in leaves:
                    check(leaf)
            except LightRFTError as error:
                raise type(error)(f"{call.split()[0]}: {error}") from error
            ordered = [leaves[index] for index in _canonical(leaves)]
            if first_dim:
                message["rows"] = [len(_with_rows(leaf.tensor)) for leaf in ordered]
            if self._world.size > 1:
                schema += (leaf.schema(first_dim) for leaf in ordered)
                message["schema"] = blake2b(json.dumps(schema).encode(), digest_size=16).hexdigest()
                tensors = [_with_rows(leaf.tensor) for leaf in ordered]
                if (
                    tensors
                    and all(tensor.device.type == "cpu" for tensor in tensors)
                    and _frame_bytes(tensors) <= SMALL
                ):
                    message["frame"] = base64.b64encode(_frame(tensors).numpy().tobytes()).decode()
        if any(other["schema"] != message["schema"] for other in messages if self._world.size > 1):
            require_equal(call, self._consensus.exchange(call, schema))
        return leaves, messages

    # Transport

    def _reduce(self, buffer_N: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """Return the sum, or the maximum, of ``buffer_N`` over the ranks. A NaN on any rank gives a NaN."""
        group = self._group_for(buffer_N.device)
        if op == "sum" and buffer_N.dtype is torch.int64:
            return self._sum_of_integers(buffer_N, group)
        if op != "max" or not buffer_N.is_floating_point():
            dist.all_reduce(buffer_N, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
            return buffer_N
        # gloo takes the maximum by comparing, and a comparison with NaN is false: the NaN would be lost.
        is_nan_N = buffer_N.isnan()
        both_2N = torch.cat([buffer_N.masked_fill(is_nan_N, -torch.inf), is_nan_N.to(buffer_N.dtype)])
        dist.all_reduce(both_2N, dist.ReduceOp.MAX, group=group)
        return both_2N[: buffer_N.numel()].masked_fill_(both_2N[buffer_N.numel() :] > 0, torch.nan)

    @staticmethod
    def _sum_of_integers(buffer_N: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        halves_2N = _halves(buffer_N)
        dist.all_reduce(halves_2N, dist.ReduceOp.SUM, group=group)
        return _joined(halves_2N)

    def _group_for(self, device: torch.device) -> dist.ProcessGroup | None:
        return self._world.cpu_group if device.type == "cpu" else self._world.device_group

    def _gather(
        self, tensors: Sequence[torch.Tensor], rows: Sequence[Sequence[int]], frames_RF: torch.Tensor | None
    ) -> list[list[torch.Tensor]]:
        """Return each rank's tensors, in rank order, from its frame.

        Args:
            tensors: This rank's tensors, on one device.
            rows: For each rank, the size of the first dimension of each tensor.
            frames_RF: The frames of all ranks, if they came with the messages. None: one collective gathers them.
        """
        if frames_RF is None:
            sizes = [
                sum(_aligned(_row_bytes(tensor) * count) for tensor, count in zip(tensors, counts, strict=True))
                for counts in rows
            ]
            frame_F = _frame(tensors)
            frame_F = torch.nn.functional.pad(frame_F, (0, max(sizes) - frame_F.numel()))
            frames = [torch.empty_like(frame_F) for _ in range(self._world.size)]
            dist.all_gather(frames, frame_F, group=self._group_for(frame_F.device))
        else:
            frames = list(frames_RF)
        return [_unpack(frame, tensors, counts) for frame, counts in zip(frames, rows, strict=True)]


# Reducing


def _reduce_rows(rows_RN: torch.Tensor, op: str) -> torch.Tensor:
    """Reduce over the rows, one per rank, in rank order: as `Collectives._reduce`, without a collective."""
    if op == "max":
        return rows_RN.amax(0)
    if op == "sum" and rows_RN.dtype is torch.int64:
        return _joined(_halves(rows_RN).sum(1))
    total_N = rows_RN[0].clone()
    for row_N in rows_RN[1:]:  # not sum(0), whose order of summation depends on the number of columns
        total_N += row_N
    return total_N


def _halves(values: torch.Tensor) -> torch.Tensor:
    """Return the high and low 32 bits of int64 values: a sum of int64 that overflows would wrap around silently."""
    return torch.stack([values >> 32, values & 0xFFFFFFFF])


def _joined(halves_2N: torch.Tensor) -> torch.Tensor:
    """Return the int64 values of sums of `_halves`.

    Raises:
        ArgumentError: On every rank, if a sum does not fit int64.
    """
    high_N, low_N = halves_2N[0] + (halves_2N[1] >> 32), halves_2N[1] & 0xFFFFFFFF
    limits = torch.iinfo(torch.int32)
    if high_N.numel() and (high_N.min() < limits.min or high_N.max() > limits.max):
        raise ArgumentError(
            "all_reduce: expected a sum of integers that fits torch.int64, got a larger one. Cast them to a float first"
        )
    return (high_N << 32) | low_N


# Leaves


def _canonical(leaves: Sequence[Leaf]) -> list[int]:
    """Return the indices of the leaves, sorted by name: ranks may hold the same keys in another order."""
    return sorted(range(len(leaves)), key=lambda index: leaves[index].name)


def _grouped(leaves: Sequence[Leaf], key: Callable[[Leaf], Hashable]) -> list[list[int]]:
    """Return the indices of the leaves, grouped by ``key``; all ranks get the same groups in the same order."""
    return list(grouped((key(leaves[index]), index) for index in _canonical(leaves)).values())


def _with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``; a scalar as one row."""
    return tensor if tensor.ndim else tensor.reshape(1)


def _check_reducible(leaf: Leaf, op: str) -> None:
    if op not in get_args(ReduceOp):
        raise ArgumentError(f"expected op to be one of {', '.join(map(repr, get_args(ReduceOp)))}, got {shown(op)}")
    if op == "mean" and leaf.is_integer and leaf.number is None:
        raise ArgumentTypeError(
            f"expected a floating-point tensor for a mean, got {leaf.tensor.dtype} for {leaf.name}. Cast it to a float first"
        )
    if op == "sum" and leaf.tensor.dtype is torch.bool:
        raise ArgumentTypeError(
            f"expected numbers for a sum, got torch.bool for {leaf.name}. Cast it to an integer first"
        )


def _working_dtype(leaf: Leaf, op: str) -> torch.dtype:
    """Return the dtype in which a leaf is reduced: fp32 for half precision, int64 for integers, 64 bits for numbers."""
    if leaf.tensor.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    if leaf.is_integer:
        return torch.float64 if op == "mean" else torch.int64
    return leaf.tensor.dtype


def _result(leaf: Leaf, values: torch.Tensor, op: str) -> torch.Tensor | float:
    """Return ``values`` in the shape and dtype of the leaf, or as a number if the leaf was one."""
    if leaf.number is not None:
        value = values.item()
        return float(value) if op == "mean" or leaf.number is float else int(value)
    dtype = leaf.tensor.dtype
    if leaf.is_integer and dtype is not torch.bool and values.numel():
        limits = torch.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise ArgumentError(
                f"all_reduce: expected a {op} that fits {dtype}, got a larger one for {leaf.name}. Cast it to torch.int64 first"
            )
    return values.to(dtype).reshape(leaf.tensor.shape)


# Frames: the bytes of one rank's tensors, sorted by name


def _frame(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the bytes of ``tensors``, each padded to `ALIGNMENT`."""
    return torch.cat([_padded_bytes(tensor) for tensor in tensors])


def _frame_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _frames_in(messages: Sequence[dict[str, Any]]) -> torch.Tensor | None:
    """Return the frames that came with the messages of all ranks, (R, F); None unless all came with one."""
    if not all("frame" in message for message in messages):
        return None
    frames = [base64.b64decode(message["frame"]) for message in messages]
    longest = max(ALIGNMENT, *map(len, frames))  # rows of no bytes would not be aligned
    joined = bytearray(b"".join(frame.ljust(longest, b"\0") for frame in frames))
    return torch.frombuffer(joined, dtype=torch.uint8).view(len(frames), longest)


def _spans(leaves: Sequence[Leaf]) -> dict[int, slice]:
    """Return the position of each leaf in a frame, by its index."""
    spans, start = {}, 0
    for index in _canonical(leaves):
        size = leaves[index].tensor.nbytes
        spans[index] = slice(start, start + size)
        start += _aligned(size)
    return spans


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _row_bytes(tensor: torch.Tensor) -> int:
    return tensor.element_size() * tensor.shape[1:].numel()


def _padded_bytes(tensor: torch.Tensor) -> torch.Tensor:
    row = as_bytes(tensor.contiguous())
    return torch.nn.functional.pad(row, (0, _aligned(row.numel()) - row.numel()))


def _unpack(frame_F: torch.Tensor, like: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
    """Return the tensors of one rank's frame: dtypes and row shapes as in ``like``, ``counts`` rows."""
    parts, start = [], 0
    for tensor, count in zip(like, counts, strict=True):
        size = _row_bytes(tensor) * count
        parts.append(frame_F[start : start + size].view(tensor.dtype).reshape(count, *tensor.shape[1:]))
        start += _aligned(size)
    return parts
