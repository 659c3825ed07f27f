"""Views and casts of one tensor, and this rank's part of a DTensor."""

import sys
from typing import Any

import torch


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
