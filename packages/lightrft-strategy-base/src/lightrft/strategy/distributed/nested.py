"""Nested dicts of tensors and numbers, flattened to leaves and rebuilt: the arguments of `all_reduce` and `all_gather`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.config.validation import shown
from lightrft.strategy.tensors import is_dtensor

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
"""The dtypes that gloo and NCCL can reduce and gather."""


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One tensor or number, with the keys that lead to it."""

    path: tuple[object, ...]
    tensor: torch.Tensor
    number: type[int] | type[float] | None = None
    """The Python type of the value, if it was a number; ``tensor`` is then 0-dim, float64 or int64."""

    @property
    def name(self) -> str:
        """The keys, as in Python: ``['a']['b']``."""
        return "".join(f"[{key!r}]" for key in self.path) or "the argument"

    @property
    def is_integer(self) -> bool:
        return not self.tensor.dtype.is_floating_point

    def schema(self, first_dim: int = 0) -> list[object]:
        """Return what must be equal on all ranks: keys, dtype, device type, dimensions, shape from ``first_dim`` on."""
        dtype = str(self.tensor.dtype).removeprefix("torch.") if self.number is None else self.number.__name__
        return [self.name, dtype, self.tensor.device.type, self.tensor.ndim, list(self.tensor.shape[first_dim:])]


def flatten(data: object, path: tuple[object, ...] = ()) -> Iterator[Leaf]:
    """Yield the leaves of ``data``, detached, in the order of its keys.

    Args:
        data: A tensor, a number, or dicts of these, to any depth.
        path: The keys that lead to ``data``.

    Raises:
        ArgumentTypeError: A leaf is neither a number nor a dense tensor of one of `DTYPES`.
        ArgumentError: An int does not fit 64 bits.
    """
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from flatten(value, (*path, key))
    else:
        yield _leaf(data, path)


def _leaf(value: object, path: tuple[object, ...]) -> Leaf:
    name = Leaf(path=path, tensor=torch.empty(0)).name
    if isinstance(value, (int, float)):
        number = float if isinstance(value, float) else int
        if number is int and not -(2**63) <= value < 2**63:
            raise ArgumentError(f"expected integers that fit 64 bits, got {value} for {name}. Pass a float")
        dtype = torch.float64 if number is float else torch.int64
        return Leaf(path=path, tensor=torch.tensor(value, dtype=dtype), number=number)
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(
            f"expected a tensor, a number, or a dict of these, got {shown(value)} for {name}. Convert it to a tensor"
        )
    if is_dtensor(value) or value.layout is not torch.strided:
        raise ArgumentTypeError(
            f"expected plain dense tensors, got a {type(value).__name__} of layout {value.layout} for {name}. Pass "
            f"its local or dense values"
        )
    if value.dtype not in DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ArgumentTypeError(f"expected one of the dtypes {allowed}, got {value.dtype} for {name}. Cast it first")
    return Leaf(path=path, tensor=value.detach())


def rebuild(data: object, results: Iterator[Any]) -> Any:
    """Return ``data`` with its leaves replaced by ``results``, in the order in which `flatten` yields them."""
    if isinstance(data, Mapping):
        return {key: rebuild(value, results) for key, value in data.items()}
    return next(results)
