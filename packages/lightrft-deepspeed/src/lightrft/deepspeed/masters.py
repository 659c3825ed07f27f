"""Master weights that begin as the caller's fp32 weights, and not as what bfloat16 left of them.

DeepSpeed first rounds a model to bfloat16 and then makes the fp32 masters from that, so that a model would
start up to 0.4 % away from its checkpoint. Each rank keeps the fp32 values of what it will own, and puts them
back. That costs the memory of its masters a second time, until they are there.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lightrft.config import StrategyError

_ALIGNMENT = 2
"""Elements to a multiple of which, times the ranks, DeepSpeed pads a flat group (for 4-byte boundaries)."""


def owned_ranges(sizes: Sequence[int], ranks: int, rank: int) -> list[range]:
    """Of tensors that lie flattened, one after the other, in equal partitions: the elements of each in ``rank``'s.

    The layout of ZeRO 1 and 2, for one parameter group.
    """
    multiple = _ALIGNMENT * ranks
    partition = -(-sum(sizes) // multiple) * multiple // ranks
    begin, end = rank * partition, (rank + 1) * partition
    ranges, offset = [], 0
    for size in sizes:
        ranges.append(range(min(max(begin - offset, 0), size), max(min(end - offset, size), 0)))
        offset += size
    return ranges


class KeptMasters:
    """This rank's part of the trainable parameters, in fp32, by parameter."""

    def __init__(self, groups: Iterable[Sequence[nn.Parameter]], ranks: int, rank: int) -> None:
        """``groups``: the optimizer's, before DeepSpeed flattens them."""
        self._kept: dict[nn.Parameter, tuple[range, torch.Tensor]] = {}
        for group in groups:
            flat = [parameter for parameter in group if parameter.requires_grad and parameter.numel()]
            owned = owned_ranges([parameter.numel() for parameter in flat], ranks, rank)
            for parameter, part in zip(flat, owned, strict=True):
                if part:
                    values = parameter.detach().reshape(-1)[part.start : part.stop].clone()
                    self._kept[parameter] = part, values

    def restore(self) -> None:
        """Put the values into the masters that DeepSpeed made of the parameters."""
        for parameter, (part, values) in self._kept.items():
            fragment = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            address = None if fragment is None else fragment.lp_fragment_address
            if address is None or (address.start, address.numel) != (part.start, len(part)):
                raise StrategyError(
                    f"prepare: DeepSpeed laid the optimizer's groups out in another way than {__name__} knows (a parameter "
                    f"of {parameter.numel()} elements: wanted {part}, found {address}); this version of DeepSpeed is not "
                    f"supported with bf16"
                )
            fragment.hp_fragment.detach().copy_(values)
