"""The weight stream: a model's whole parameters under checkpoint names, a bucket at a time.

This is the one way by which weights leave a strategy, whatever shards them and whatever takes them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from lightrft.strategy.backend import Backend
from lightrft.strategy.rollout import saved_form

Bucket = list[tuple[str, torch.Tensor]]


def buckets_of(sizes: Mapping[str, int], units: Sequence[saved_form.Unit], limit: int) -> Iterator[list[str]]:
    """``units`` in order, packed into buckets of at most ``limit`` bytes, one larger unit alone.

    ``sizes``: bytes of each whole tensor, by name.
    """
    bucket: list[str] = []
    filled = 0
    for unit in units:
        size = sum(sizes[name] for name in unit)
        if bucket and filled + size > limit:
            yield bucket
            bucket, filled = [], 0
        bucket += unit
        filled += size
    if bucket:
        yield bucket


class Form(Protocol):
    """What leaves a model: which of its tensors, in which units, and what becomes of these."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers of a prepared model by name in memory."""

    @property
    def units(self) -> Sequence[saved_form.Unit]:
        """Their names, those together that convert together."""

    def convert(self, tensors: Mapping[str, torch.Tensor], /) -> dict[str, torch.Tensor]:
        """Whole units, under the names and in the form in which they leave."""


def full_parameters(
    backend: Backend, module: nn.Module, bucket_bytes: int, dtype: torch.dtype | None
) -> Iterator[Bucket]:
    """Yield all parameters and persistent buffers of ``module``, whole; see `StrategyBase.full_parameters`."""
    backend._settle(module)
    form = saved_form.SavedForm.of(module)
    yield from stream(backend, form, form.units, bucket_bytes, dtype)


def stream(
    backend: Backend, form: Form, units: Sequence[saved_form.Unit], bucket_bytes: int, dtype: torch.dtype | None
) -> Iterator[Bucket]:
    """Yield ``units`` of ``form``, of a settled model, whole and converted, in ``dtype``. Every rank asks for all."""
    sizes = {name: _whole_bytes(backend, form.tensors[name], dtype) for unit in units for name in unit}
    for names in buckets_of(sizes, units, bucket_bytes):
        with backend._gathered([form.tensors[name] for name in names], dtype) as whole:
            saved = form.convert(dict(zip(names, whole, strict=True)))
            yield list(saved.items())
            del saved, whole


def full_shapes(backend: Backend, module: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of what `full_parameters` yields. No communication."""
    backend._settle(module)
    tensors = saved_form.saved_tensors(module)
    return saved_form.saved_shapes(module, {name: backend._full_shape(tensor) for name, tensor in tensors.items()})


def _whole_bytes(backend: Backend, tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    item = dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.element_size()
    return backend._full_shape(tensor).numel() * item
