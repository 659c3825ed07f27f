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
    """A view: what is written here is written in the model. 1-D, or a whole tensor as it is; see `flat.elements`."""

    @property
    def range(self) -> tuple[str, int, int]:
        """Name, first element, and number of elements."""
        return self.name, self.offset, self.values.numel()

    def renamed(self, name: str) -> "Shard":
        """The same range under another name."""
        return Shard(name=name, shape=self.shape, offset=self.offset, values=self.values)

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The same range of another whole tensor of this shape, shaped like the values."""
        return whole.reshape(-1)[self.offset : self.offset + self.values.numel()].view(self.values.shape)


@dataclass(frozen=True, kw_only=True)
class StateSlice:
    """Where an optimizer keeps the state of a range of a parameter."""

    shard: Shard
    """The range."""
    key: torch.Tensor
    """The tensor by which the optimizer knows it: the parameter, or a flat partition of many."""
    start: int
    """Of the range in the flattened local part of ``key``, and so in each of its state tensors."""

    @property
    def whole(self) -> bool:
        """Whether the key is the parameter, and all of it here."""
        return self.shard.values.numel() == self.shard.shape.numel() == self.key.numel()

    def of(self, values: torch.Tensor, name: str) -> Shard:
        """This range of a state tensor, whose local part is ``values``, see `flat.elements`."""
        part = values if self.whole else values[self.start : self.start + self.shard.values.numel()]
        return Shard(name=name, shape=self.shard.shape, offset=self.shard.offset, values=part)
