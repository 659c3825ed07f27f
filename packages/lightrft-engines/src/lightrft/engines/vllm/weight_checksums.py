"""Compares the weights that a sync sent with the weights that a vLLM model holds.

vLLM fuses projections, pads, and on a CPU packs matrices so that only a multiplication shows their values. So the check
compares, layer by layer, the sum of the bits of all values, which neither fusing nor padding with zeros changes.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightrft.config import EngineError
from lightrft.engines.weight_names import canonical

_LAYER = re.compile(r"^.*?\.\d+(?=\.)")
_ROWS = 256
"""Rows of an identity matrix by which packed weights are read back, at a time."""


def count_sent(tensors: Iterator[tuple[str, torch.Tensor]], sums: Counter[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield ``tensors`` unchanged, and add the sum of each to ``sums`` under its layer."""
    for name, tensor in tensors:
        sums[_layer(name)] += bit_sum(tensor)
        yield name, tensor


def held_sums(model: nn.Module) -> Mapping[str, int]:
    """The sums of the weights that ``model`` holds, by layer."""
    sums: Counter[str] = Counter()
    seen: set[int] = set()
    for name, layer in model.named_modules():
        for parameter_name, tensor in layer.named_parameters(recurse=False):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                sums[_layer(f"{name}.{parameter_name}")] += sum(map(bit_sum, _values(layer, parameter_name, tensor)))
    return sums


def require_equal(sent: Mapping[str, int], held: Mapping[str, int]) -> None:
    """Raise `EngineError` with the names of the layers in which ``sent`` and ``held`` differ."""
    differing = sorted(layer for layer in sent.keys() | held.keys() if sent.get(layer, 0) != held.get(layer, 0))
    if differing:
        raise EngineError(
            f"update_weights: expected vLLM to hold the weights that were sent, got others in {len(differing)} layers "
            f"({differing[0]} first). Sync again, or set up a new engine"
        )


def bit_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's values in fp32, read as integers; -0.0 counts as 0.0."""
    words = (tensor.detach().float() + 0.0).contiguous().view(torch.int32)
    return int(words.sum(dtype=torch.int64))


def _layer(name: str) -> str:
    match = _LAYER.match(canonical(name))
    return match.group() if match else "outside layers"


def _values(layer: Any, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A parameter's values, read back by multiplication if only a packed copy is left."""
    if tensor.numel() or name != "weight" or not hasattr(layer, "cpu_linear"):
        yield tensor
        return
    width = int(getattr(layer, "input_size_per_partition", None) or layer.input_size)
    for start in range(0, width, _ROWS):
        rows = torch.eye(min(_ROWS, width - start), width, dtype=tensor.dtype)
        rows = rows.roll(start, dims=1)
        yield layer.cpu_linear(rows, tensor, None)
