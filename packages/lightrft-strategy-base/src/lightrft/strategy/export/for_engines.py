"""What a model with PEFT adapters is to an engine: its base model, with the active adapters merged in.

An engine never knows of adapters. It is built from the base model's checkpoint, or from its class, and each sync brings
weights that compute what base model and adapters compute together.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightrft.strategy.backend import Backend, cast
from lightrft.strategy.export.adapters import MergedForm
from lightrft.strategy.rollout import weights


def without_adapters(skeleton: nn.Module) -> nn.Module:
    """The base model alone of ``skeleton``, which is used up."""
    wrapped: Any = skeleton
    base: nn.Module = wrapped.unload()
    return base


def merged_shapes(backend: Backend, module: nn.Module, skeleton: nn.Module) -> Mapping[str, torch.Size]:
    """Names and shapes of what `merged_parameters` yields. No communication."""
    backend._settle(module)
    form = MergedForm(module, skeleton)
    empty = {name: torch.empty(backend._full_shape(tensor), device="meta") for name, tensor in form.tensors.items()}
    return {name: tensor.shape for name, tensor in form.convert(empty).items()}


def merged_parameters(
    backend: Backend, module: nn.Module, skeleton: nn.Module, bucket_bytes: int, dtype: torch.dtype | None
) -> Iterator[weights.Bucket]:
    """`weights.full_parameters` of the base model with the adapters in it, which are merged in fp32."""
    backend._settle(module)
    form = MergedForm(module, skeleton)
    units = form.units
    yield from weights.stream(backend, form, [it for it in units if not form.merges(it)], bucket_bytes, dtype)
    for bucket in weights.stream(backend, form, [it for it in units if form.merges(it)], bucket_bytes, torch.float32):
        yield [(name, cast(tensor, dtype)) for name, tensor in bucket]
