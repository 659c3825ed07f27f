"""Tensors as one row: of elements, or of bytes."""

import torch


def elements(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, detached, as a 1-D view; or as it is, where its memory is in another order, as with channels_last."""
    found = tensor.detach()
    return found.view(-1) if found.is_contiguous() else found


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, a view."""
    row = tensor.detach().view(-1)
    if len(row) == 1:  # contiguous whatever its stride is, and view wants a stride of 1
        row = row.as_strided((1,), (1,))
    return row.view(torch.uint8)
