"""Views and casts of one tensor, this rank's part of a DTensor, and lists of tensors: grouped, or packed by size."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")


def elements(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` detached, as a 1-D view; a tensor that is not contiguous keeps its shape."""
    detached = tensor.detach()
    return detached.view(-1) if detached.is_contiguous() else detached


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as a 1-D uint8 view."""
    row = tensor.detach().view(-1)
    if len(row) == 1:  # contiguous with any stride, but a view in another dtype needs a stride of 1
        row = row.as_strided((1,), (1,))
    return row.view(torch.uint8)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, without a copy."""
    array: Any = as_bytes(tensor).numpy()
    return memoryview(array)


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return ``tensor`` detached and, if it is floating point and ``dtype`` is given, cast to ``dtype``."""
    return tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()


def is_dtensor(tensor: object) -> bool:
    """Return whether ``tensor`` is a DTensor.

    Does not import ``torch.distributed.tensor``, which takes as long as torch itself: before that import, no DTensor
    exists.
    """
    dtensor_class = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor_class is not None and isinstance(tensor, dtensor_class)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, and any other tensor unchanged."""
    distributed: Any = tensor
    part: torch.Tensor = distributed.to_local() if is_dtensor(tensor) else tensor
    return part


def grouped(pairs: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    """Return the values of each key, keys and values in order."""
    groups: dict[K, list[T]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def packed(items: Iterable[T], nbytes: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield ``items`` in order, in lists of at most ``limit`` bytes; a larger item comes alone."""
    pack: list[T] = []
    filled = 0
    for item in items:
        size = nbytes(item)
        if pack and filled + size > limit:
            yield pack
            pack, filled = [], 0
        pack.append(item)
        filled += size
    if pack:
        yield pack
