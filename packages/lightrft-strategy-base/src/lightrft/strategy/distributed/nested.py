"""Nested dicts of tensors and numbers, flattened to leaves and put together again.

What `all_reduce` and `all_gather` take: a tensor, a number, or dicts of these, to any depth.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.strategy.distributed.dtensors import is_dtensor

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One tensor or number, with the keys that lead to it."""

    path: tuple[Any, ...]
    tensor: torch.Tensor
    number: type[int] | type[float] | None = None
    """The Python type that came in, where it was a number; ``tensor`` is then float64 or int64, 0-dim."""

    @property
    def name(self) -> str:
        return "".join(f"[{key!r}]" for key in self.path) or "the argument"

    @property
    def is_integer(self) -> bool:
        return not self.tensor.dtype.is_floating_point

    def schema(self, first_dim: int = 0) -> list[Any]:
        """What must be equal on all ranks: keys, dtype, device type, shape from ``first_dim`` on."""
        kind = str(self.tensor.dtype).removeprefix("torch.") if self.number is None else self.number.__name__
        return [self.name, kind, self.tensor.device.type, self.tensor.ndim, list(self.tensor.shape[first_dim:])]


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[Leaf]:
    """The leaves of ``data`` in the order of its keys, detached. Raises `ArgumentTypeError` on what is none."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    else:
        yield _leaf(data, path)


def _leaf(value: Any, path: tuple[Any, ...]) -> Leaf:
    where = Leaf(path=path, tensor=torch.empty(0)).name
    if isinstance(value, (int, float)):
        number = float if isinstance(value, float) else int
        if number is int and not -(2**63) <= value < 2**63:
            raise ArgumentError(f"{where} is {value}, which does not fit 64 bits; pass a float")
        dtype = torch.float64 if number is float else torch.int64
        return Leaf(path=path, tensor=torch.tensor(value, dtype=dtype), number=number)
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(
            f"{where} is {value!r} ({type(value).__name__}); wanted a tensor, a number, or a dict of these"
        )
    if is_dtensor(value) or value.layout is not torch.strided:
        raise ArgumentTypeError(
            f"{where} is a {type(value).__name__} of layout {value.layout}; wanted a plain dense tensor"
        )
    if value.dtype not in DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ArgumentTypeError(f"{where} has dtype {value.dtype}; wanted one of {wanted}")
    return Leaf(path=path, tensor=value.detach())


def rebuild(data: Any, results: Iterator[Any]) -> Any:
    """``data`` with its leaves replaced by ``results``, in the order in which `leaves` yields them."""
    if isinstance(data, Mapping):
        return {key: rebuild(value, results) for key, value in data.items()}
    return next(results)
