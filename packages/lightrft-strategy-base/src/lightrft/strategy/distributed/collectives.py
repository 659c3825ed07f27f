"""all_reduce, all_gather, and the small messages by which ranks agree before they do anything costly.

Every call begins with one exchange of a short message a rank, over gloo. In it travel the call's name, the
schema of its argument, and whatever is wrong with the argument: so a mistake on one rank raises the same
error on every rank, and no rank is left waiting in a collective that another one never entered. Then comes
one collective for each dtype and device.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from lightrft.config import ArgumentError, ArgumentTypeError, LightRFTError, StrategyError
from lightrft.strategy.distributed.nested import Leaf, leaves, rebuild
from lightrft.strategy.distributed.operations import Operations
from lightrft.strategy.distributed.world import World
from lightrft.strategy.flat import as_bytes

ReduceOp = Literal["mean", "sum", "max"]
FRAME = 1024
"""Bytes of a message that travel in the first, and nearly always only, round."""
ALIGNMENT = 16
"""Bytes to which each tensor starts in the buffer that `all_gather` sends."""


class Collectives:
    """The collectives of one `World`. Every rank makes the same calls in the same order."""

    def __init__(self, world: World, operations: Operations) -> None:
        self._world, self._operations = world, operations
        self._left: str | None = None
        """Why this rank is not where the others are."""

    # Agreement

    def exchange(self, call: str, message: Any) -> list[Any]:
        """Every rank's ``message``, JSON values of a few hundred bytes, in rank order.

        Raises `StrategyError` on every rank where the ranks are in different calls.
        """
        if self._world.size == 1:
            return [message]
        if self._left is not None:
            raise StrategyError(
                f"{call}: refused, since {self._left}, and the other ranks are not where this one is; close the strategy"
            )
        envelopes = self._exchange_json([call, message])
        calls = [made for made, _ in envelopes]
        if len(set(calls)) > 1:
            made = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(calls))
            raise StrategyError(
                f"the ranks make different calls: {made}. Every rank must make the same calls in the same order"
            )
        return [message for _, message in envelopes]

    def _exchange_json(self, message: Any) -> list[Any]:
        text = json.dumps(message).encode()
        frames = self._gather_bytes(len(text).to_bytes(8) + text[: FRAME - 8], FRAME)
        lengths = [int.from_bytes(frame[:8]) for frame in frames]
        if max(lengths) > FRAME - 8:
            frames = [b"-" * 8 + frame for frame in self._gather_bytes(text, max(lengths))]
        return [json.loads(frame[8 : 8 + length]) for frame, length in zip(frames, lengths, strict=True)]

    def agree(self, call: str, value: Any) -> None:
        """Raise `StrategyError` on every rank unless all make this ``call`` with an equal ``value``."""
        _compare(call, self.exchange(call, value))

    def agree_on_all(self, call: str, entries: Sequence[Any]) -> None:
        """Like `agree`, for a long list of JSON values: the ranks compare digests, and the lists only where these differ."""
        digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        if len(set(self.exchange(call, digest))) > 1:
            self.agree(call, list(entries))

    def barrier(self) -> None:
        """Wait for every rank."""
        self.agree("barrier", None)

    @contextmanager
    def together(
        self, call: str, kind: type[LightRFTError] = StrategyError, tell: Callable[[], Any] = lambda: None
    ) -> Iterator[list[Any]]:
        """Run the body on every rank; where it raises on some, raise on all.

        The ranks where the body raised raise that error, the others one of ``kind`` that quotes it. The
        body must not contain a collective that a failing rank would leave the others waiting in. The list that
        the body gets has, once the ranks have met, what each ``tell`` returned after it, whether it raised or not.
        """
        error: Exception | None = None
        told: list[Any] = []
        try:
            yield told
        except Exception as raised:  # noqa: BLE001 - carried to the other ranks, then raised again
            error = raised
        except (KeyboardInterrupt, SystemExit) as interruption:  # to go at once: the others are at it still
            self._left = f"{call} was left by {type(interruption).__name__}"
            raise
        failed = None if error is None else f"{type(error).__name__}: {error}"
        messages = self.exchange(call, [failed, tell()])
        told += [value for _, value in messages]
        if error is not None:
            raise error
        reasons = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(messages) if reason]
        if reasons:
            raise kind(f"{call} failed on another rank; {'; '.join(reasons)}")

    # Data

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        """Reduce every leaf of ``data`` over the ranks; see `StrategyBase.all_reduce`."""
        found, _ = self._agreed(f"all_reduce {op}", data, lambda leaf: _check_reducible(leaf, op), first_dim=0)
        reduced: dict[int, Any] = {}
        for group in _grouped(found, lambda leaf: (leaf.tensor.device, _working_dtype(leaf, op))):
            dtype = _working_dtype(found[group[0]], op)
            flat = [found[index].tensor.reshape(-1).to(dtype) for index in group]
            buffer = torch.cat(flat) if len(flat) > 1 else flat[0].clone()
            if self._world.size > 1:
                buffer = self._reduced(buffer, op)
            if op == "mean":
                buffer /= self._world.size
            for index, values in zip(group, buffer.split([part.numel() for part in flat]), strict=True):
                reduced[index] = _result(found[index], values, op)
        return rebuild(data, (reduced[index] for index in range(len(found))))

    def all_gather(self, data: Any) -> Any:
        """Concatenate every leaf of ``data`` over the ranks; see `StrategyBase.all_gather`."""
        found, messages = self._agreed("all_gather", data, lambda leaf: None, first_dim=1)
        gathered: dict[int, torch.Tensor] = {}
        order = _canonical(found)
        for group in _grouped(found, lambda leaf: leaf.tensor.device):
            rows = [[message["rows"][order.index(index)] for index in group] for message in messages]
            parts = self._gather_leaves([found[index] for index in group], rows)
            for position, index in enumerate(group):
                gathered[index] = torch.cat([rank_parts[position] for rank_parts in parts])
        return rebuild(data, (gathered[index] for index in range(len(found))))

    def _agreed(
        self, call: str, data: Any, check: Callable[[Leaf], None], first_dim: int
    ) -> tuple[list[Leaf], list[dict[str, Any]]]:
        """The leaves of ``data``, once all ranks are known to pass leaves of the same schema, and no errors."""
        found: list[Leaf] = []
        message: dict[str, Any] = {}
        own: Exception | None = None
        try:
            found = list(leaves(data))
            for leaf in found:
                check(leaf)
            order = _canonical(found)
            message["schema"] = [found[index].schema(first_dim) for index in order]
            message["rows"] = [_rows(found[index]) for index in order]
        except Exception as error:  # noqa: BLE001 - carried to the other ranks, and raised on all
            own = error
            text = str(error) if isinstance(error, LightRFTError) else f"{type(error).__name__}: {error}"
            message["error"] = [type(error).__name__, text]
        messages = self.exchange(call, message)
        errors = [(rank, *it["error"]) for rank, it in enumerate(messages) if "error" in it]
        if errors:
            kind = ArgumentTypeError if errors[0][1] == ArgumentTypeError.__name__ else ArgumentError
            raise kind(f"{call.split()[0]}: " + "; ".join(f"rank {r}: {text}" for r, _, text in errors)) from own
        _compare(call, [it["schema"] for it in messages])
        return found, messages

    # Transport

    def _reduced(self, buffer: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """The sum, or the maximum, of ``buffer`` over the ranks. A NaN of any rank stays one."""
        group = self._group_for(buffer.device)
        if op == "sum" and buffer.dtype is torch.int64:
            return self._sum_of_integers(buffer, group)
        if op != "max":
            dist.all_reduce(buffer, dist.ReduceOp.SUM, group=group)
            return buffer
        if not buffer.is_floating_point():
            dist.all_reduce(buffer, dist.ReduceOp.MAX, group=group)
            return buffer
        # gloo finds the larger of two numbers by a comparison, which a NaN loses
        lost = buffer.isnan()
        both = torch.cat([buffer.masked_fill(lost, -torch.inf), lost.to(buffer.dtype)])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
        return both[: buffer.numel()].masked_fill_(both[buffer.numel() :] > 0, torch.nan)

    @staticmethod
    def _sum_of_integers(buffer: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """In halves, since an int64 sum that is too large would wrap around. Raises `ArgumentError` on every rank there."""
        halves = torch.stack([buffer >> 32, buffer & 0xFFFFFFFF])
        dist.all_reduce(halves, dist.ReduceOp.SUM, group=group)
        high, low = halves[0] + (halves[1] >> 32), halves[1] & 0xFFFFFFFF
        limits = torch.iinfo(torch.int32)
        if high.numel() and (high.min() < limits.min or high.max() > limits.max):
            raise ArgumentError("all_reduce: a sum of integers does not fit torch.int64; cast them to a float first")
        return (high << 32) | low

    def _group_for(self, device: torch.device) -> dist.ProcessGroup | None:
        return self._world.control if device.type == "cpu" else self._world.payload

    def _gather_bytes(self, text: bytes, size: int) -> list[bytes]:
        """Every rank's ``text``, padded with zeros to ``size`` bytes."""
        frame = torch.frombuffer(bytearray(text.ljust(size, b"\0")), dtype=torch.uint8)
        frames = [torch.empty_like(frame) for _ in range(self._world.size)]
        dist.all_gather(frames, frame, group=self._world.control)
        return [bytes(it.numpy()) for it in frames]

    def _gather_leaves(self, found: Sequence[Leaf], rows: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        """For each rank, each leaf with that rank's ``rows``; one collective of bytes, padded to the largest."""
        tensors = [leaf.tensor.reshape(1) if leaf.tensor.ndim == 0 else leaf.tensor for leaf in found]
        if self._world.size == 1:
            return [tensors]
        own = torch.cat([_padded_bytes(tensor) for tensor in tensors])
        total = max(
            sum(_aligned(_row_bytes(tensor) * count) for tensor, count in zip(tensors, counts, strict=True))
            for counts in rows
        )
        frame = torch.nn.functional.pad(own, (0, total - own.numel()))
        frames = [torch.empty_like(frame) for _ in range(self._world.size)]
        dist.all_gather(frames, frame, group=self._group_for(frame.device))
        return [_unpacked(frame, tensors, counts) for frame, counts in zip(frames, rows, strict=True)]


def _compare(call: str, schemas: Sequence[Any]) -> None:
    if any(schema != schemas[0] for schema in schemas):
        given = "; ".join(f"rank {rank}: {_difference(schema, schemas)}" for rank, schema in enumerate(schemas))
        raise StrategyError(f"{call}: the ranks do not agree: {given}")


def _canonical(found: Sequence[Leaf]) -> list[int]:
    """Indices of the leaves by name: ranks may hold the same keys in another order."""
    return sorted(range(len(found)), key=lambda index: found[index].name)


def _grouped(found: Sequence[Leaf], key: Callable[[Leaf], Any]) -> list[list[int]]:
    """Indices of the leaves with equal ``key``, each group and the groups in an order that all ranks share."""
    groups: dict[Any, list[int]] = {}
    for index in _canonical(found):
        groups.setdefault(key(found[index]), []).append(index)
    return list(groups.values())


def _rows(leaf: Leaf) -> int:
    return leaf.tensor.shape[0] if leaf.tensor.ndim else 1


def _check_reducible(leaf: Leaf, op: str) -> None:
    if op not in get_args(ReduceOp):
        raise ArgumentError(f"op={op!r} is not one of {', '.join(map(repr, get_args(ReduceOp)))}")
    if op == "mean" and leaf.is_integer and leaf.number is None:
        raise ArgumentTypeError(
            f"mean of {leaf.name}, which is {leaf.tensor.dtype}, is no integer; cast it to a float first"
        )
    if op == "sum" and leaf.tensor.dtype is torch.bool:
        raise ArgumentTypeError(f"sum of {leaf.name}, which is torch.bool, is no bool; cast it to an integer first")


def _working_dtype(leaf: Leaf, op: str) -> torch.dtype:
    """The type in which a leaf is reduced: half precision in fp32, integers in int64, numbers in 64 bits."""
    if leaf.tensor.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    if leaf.is_integer:
        return torch.float64 if op == "mean" else torch.int64
    return leaf.tensor.dtype


def _result(leaf: Leaf, values: torch.Tensor, op: str) -> Any:
    """``values`` in the shape and type in which the leaf came in."""
    if leaf.number is not None:
        value = values.item()
        return float(value) if op == "mean" or leaf.number is float else int(value)
    dtype = leaf.tensor.dtype
    if leaf.is_integer and dtype is not torch.bool and values.numel():
        limits = torch.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise ArgumentError(f"all_reduce: {op} of {leaf.name} does not fit {dtype}; cast it to torch.int64 first")
    return values.to(dtype).reshape(leaf.tensor.shape)


def _difference(schema: Any, schemas: Sequence[Any]) -> str:
    """What one rank passed, less what all ranks passed alike."""
    if not isinstance(schema, list):
        return repr(schema)
    own = [_words(entry) for entry in schema if not all(entry in other for other in schemas)]
    more = f" and {len(own) - 4} more" if len(own) > 4 else ""
    return ", ".join(own[:4]) + more or "nothing else"


def _words(entry: Any) -> str:
    if not (isinstance(entry, list) and len(entry) == 5):
        return repr(entry)
    name, kind, device, ndim, shape = entry
    dims = "x".join(["n"] * (ndim - len(shape)) + [str(size) for size in shape]) or "scalar"
    return f"{name} {kind} {dims} on {device}"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _row_bytes(tensor: torch.Tensor) -> int:
    return tensor.element_size() * tensor.shape[1:].numel()


def _padded_bytes(tensor: torch.Tensor) -> torch.Tensor:
    row = as_bytes(tensor.contiguous())
    return torch.nn.functional.pad(row, (0, _aligned(row.numel()) - row.numel()))


def _unpacked(frame: torch.Tensor, like: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
    parts, start = [], 0
    for tensor, count in zip(like, counts, strict=True):
        size = _row_bytes(tensor) * count
        parts.append(frame[start : start + size].view(tensor.dtype).reshape(count, *tensor.shape[1:]))
        start += _aligned(size)
    return parts
