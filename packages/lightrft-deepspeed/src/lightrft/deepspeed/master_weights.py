"""fp32 master weights that start from the caller's fp32 weights, not from weights rounded to bfloat16.

DeepSpeed rounds a model to bfloat16 first and makes the fp32 master weights from that, so that a model would start up
to 0.4 % away from its checkpoint:
https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py#L577. Each rank keeps the
fp32 values of the ranges that it will own, and copies them to the master weights; until then they take their memory
twice.

The module also copies what a script writes to the parameters to the master weights; DeepSpeed would overwrite it in
the next step.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from lightrft.config import StrategyError

_ALIGNMENT = 2
"""DeepSpeed pads a flat group to a multiple of this many elements, times the ranks (for 4-byte boundaries)."""


def owned_ranges(sizes: Sequence[int], ranks: int, rank: int) -> list[range]:
    """Return which elements of each tensor ``rank`` owns, in the layout of ZeRO 1 and 2 for one parameter group.

    Args:
        sizes: Numbers of elements of the tensors, which are flattened and concatenated, in equal partitions.
        ranks: Number of partitions.
        rank: Index of the partition.
    """
    multiple = _ALIGNMENT * ranks
    partition = -(-sum(sizes) // multiple) * multiple // ranks
    begin, end = rank * partition, (rank + 1) * partition
    ranges, offset = [], 0
    for size in sizes:
        ranges.append(range(min(max(begin - offset, 0), size), max(min(end - offset, size), 0)))
        offset += size
    return ranges


class Writes:
    """Notices what a script writes to parameters, by their version counters; writes through ``.data`` move none."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters, self._versions = parameters, [parameter._version for parameter in parameters]

    def pending(self) -> list[nn.Parameter]:
        """Return the parameters written to since the last `take`."""
        known = zip(self._parameters, self._versions, strict=True)
        return [parameter for parameter, version in known if parameter._version != version]

    def take(self) -> list[nn.Parameter]:
        """Return the parameters written to since the last call."""
        written = self.pending()
        if written:
            self._versions = [parameter._version for parameter in self._parameters]
        return written


def take_over(written: torch.Tensor, master: torch.Tensor) -> None:
    """Copy ``written`` to ``master``, except where it is the rounded master weight already."""
    master.copy_(torch.where(written == master.to(written.dtype), master, written.to(master.dtype)))


class Fp32Weights:
    """This rank's ranges of the trainable parameters, in fp32."""

    def __init__(self, groups: Iterable[Sequence[nn.Parameter]], ranks: int, rank: int) -> None:
        """Copy the ranges. ``groups``: the optimizer's, before DeepSpeed flattens them."""
        self._weights: dict[nn.Parameter, tuple[range, torch.Tensor]] = {}
        for group in groups:
            flat = [parameter for parameter in group if parameter.requires_grad and parameter.numel()]
            ranges = owned_ranges([parameter.numel() for parameter in flat], ranks, rank)
            for parameter, owned in zip(flat, ranges, strict=True):
                if owned:
                    self._weights[parameter] = owned, parameter.detach().reshape(-1)[owned.start : owned.stop].clone()

    def restore(self) -> None:
        """Copy the values to the master weights that DeepSpeed made of the parameters.

        Raises:
            StrategyError: DeepSpeed laid the parameters out in another way.
        """
        for parameter, (owned, values) in self._weights.items():
            fragment = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            address = None if fragment is None else fragment.lp_fragment_address
            if address is None or (address.start, address.numel) != (owned.start, len(owned)):
                raise StrategyError(
                    f"prepare: expected DeepSpeed to give this rank the elements {owned} of a parameter of "
                    f"{parameter.numel()}, got {address}. This version of DeepSpeed arranges optimizer groups in another way than "
                    f"{__name__} expects. Use bf16=False, or another version of DeepSpeed"
                )
            fragment.hp_fragment.detach().copy_(values)
