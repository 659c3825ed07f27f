"""The part of a model's state that one rank holds: ranges of flattened tensors.

FSDP2's dim-0 shards and ZeRO's partitions are both contiguous ranges of the flattened whole, and a whole
tensor is one too. Whatever moves state between layouts is written once, over ranges.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A range of one tensor, held by this rank."""

    name: str
    shape: torch.Size
    """Of the whole tensor."""
    offset: int
    """Of the range's first element in the flattened whole."""
    values: torch.Tensor
    """1-D, a view: what is written here is written in the model."""

    @property
    def range(self) -> tuple[str, int, int]:
        """Name, first element, and number of elements."""
        return self.name, self.offset, self.values.numel()

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same range of another whole tensor of this shape, 1-D."""
        return whole.reshape(-1)[self.offset : self.offset + self.values.numel()]
