"""Host memory for what is saved while training goes on."""

from collections.abc import Sequence
from itertools import accumulate

import torch

_ALIGNMENT = 64
"""Copies begin at multiples of so many bytes."""


class Staging:
    """Memory for copies, kept from one save to the next: to get it takes longer than to copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def copies(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of 1-D ``tensors`` on any device, in the place of those that were made before."""
        *begins, end = accumulate((-(-it.nbytes // _ALIGNMENT) * _ALIGNMENT for it in tensors), initial=0)
        if self._memory.nbytes < end:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old goes before the new comes
            self._memory = torch.empty(end, dtype=torch.uint8)
        places = (self._memory[begin : begin + it.nbytes] for begin, it in zip(begins, tensors, strict=True))
        return [place.view(it.dtype).copy_(it) for place, it in zip(places, tensors, strict=True)]
