"""Whether the weights that a sync sent are the weights that a vLLM model has.

vLLM fuses projections, pads, and on a CPU packs matrices so that only multiplying shows them; so what is compared is a
sum of the bits of all numbers, layer by layer, which neither fusing nor padding with zeros changes.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightrft.config import EngineError
from lightrft.engines.naming import canonical

_LAYER = re.compile(r"^.*?\.\d+(?=\.)")
_ROWS = 256
"""Of an identity matrix, by which packed weights are read back, at a time."""


def sent_sums(tensors: Iterator[tuple[str, torch.Tensor]], sums: Counter[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """``tensors`` as they are; what they add up to goes to ``sums``."""
    for name, tensor in tensors:
        sums[_layer(name)] += bit_sum(tensor)
        yield name, tensor


def held_sums(model: nn.Module) -> Mapping[str, int]:
    """The same of what ``model`` holds."""
    sums: Counter[str] = Counter()
    seen: set[int] = set()
    for name, layer in model.named_modules():
        for own, tensor in layer.named_parameters(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                sums[_layer(f"{name}.{own}")] += sum(map(bit_sum, _values(layer, own, tensor)))
    return sums


def require_equal(sent: Mapping[str, int], held: Mapping[str, int]) -> None:
    """Raise `EngineError`, with the names of layers, where they differ."""
    differing = sorted(layer for layer in sent.keys() | held.keys() if sent.get(layer, 0) != held.get(layer, 0))
    if differing:
        raise EngineError(
            f"update_weights: the weights that vLLM holds are not those that were sent, in {len(differing)} parts, "
            f"{differing[0]} first"
        )


def bit_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's numbers, in fp32 and read as integers; -0.0 counts as 0.0."""
    words = (tensor.detach().float() + 0.0).contiguous().view(torch.int32)
    return int(words.sum(dtype=torch.int64))


def _layer(name: str) -> str:
    found = _LAYER.match(canonical(name))
    return found.group() if found else "outside layers"


def _values(layer: Any, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A parameter's numbers, read back by multiplication where only a packed copy is left."""
    if tensor.numel() or name != "weight" or not hasattr(layer, "cpu_linear"):
        yield tensor
        return
    width = int(getattr(layer, "input_size_per_partition", None) or layer.input_size)
    for start in range(0, width, _ROWS):
        rows = torch.eye(min(_ROWS, width - start), width, dtype=tensor.dtype)
        rows = rows.roll(start, dims=1)
        yield layer.cpu_linear(rows, tensor, None)
