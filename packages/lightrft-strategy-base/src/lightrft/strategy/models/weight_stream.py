"""The weight stream: a model's full parameters under checkpoint names, a bucket at a time.

Exports and weight syncs both use it, with every backend.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.models.adapters import MergedAdapters, has_adapters
from lightrft.strategy.models.state_dict_adapter import StateDictAdapter, Unit
from lightrft.strategy.tensors import cast, packed

Bucket = list[tuple[str, torch.Tensor]]
"""Names in a checkpoint, and full tensors."""


class WeightConverter(Protocol):
    """Converts the tensors of a prepared model to those of a checkpoint: their names and layout."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Parameters and buffers of a prepared model by name in memory."""

    @property
    def units(self) -> Sequence[Unit]:
        """Their names, grouped into those that convert together."""

    def merges(self, unit: Unit, /) -> bool:
        """Return whether adapters are merged in ``unit``, which needs full precision."""

    def convert(self, tensors: Mapping[str, torch.Tensor], /) -> dict[str, torch.Tensor]:
        """Return whole units, converted to the names and layout of a checkpoint."""


def converter_for_engines(module: nn.Module, meta_model: nn.Module | None) -> WeightConverter:
    """Return the converter to what an engine loads: the base model of ``module``, with adapters merged in."""
    if has_adapters(module):
        return MergedAdapters(module, module if meta_model is None else meta_model)
    return StateDictAdapter.of(module)


def buckets_of(sizes: Mapping[str, int], units: Sequence[Unit], limit: int) -> Iterator[list[str]]:
    """Yield ``units`` in order, packed into buckets of at most ``limit`` bytes; a larger unit comes alone.

    Args:
        sizes: Size of each full tensor in bytes, by name.
        units: Names, grouped into those that stay together.
        limit: Size of a bucket in bytes.
    """
    for bucket in packed(units, lambda unit: sum(sizes[name] for name in unit), limit):
        yield [name for unit in bucket for name in unit]


def full_parameters(
    backend: Backend, converter: WeightConverter, bucket_bytes: int, dtype: torch.dtype | None
) -> Iterator[Bucket]:
    """Yield all tensors of ``converter``, gathered and converted, a bucket at a time.

    All ranks must take every bucket. The model must be resharded. Adapters are merged in fp32, and cast afterwards.

    Args:
        backend: Gathers the tensors.
        converter: Tensors of one prepared model.
        bucket_bytes: Size of a bucket in bytes.
        dtype: Of floating-point tensors. None: as they are.
    """
    units = converter.units
    yield from stream(backend, converter, [unit for unit in units if not converter.merges(unit)], bucket_bytes, dtype)
    for bucket in stream(
        backend, converter, [unit for unit in units if converter.merges(unit)], bucket_bytes, torch.float32
    ):
        yield from _released([(name, cast(tensor, dtype)) for name, tensor in bucket])


def stream(
    backend: Backend, converter: WeightConverter, units: Sequence[Unit], bucket_bytes: int, dtype: torch.dtype | None
) -> Iterator[Bucket]:
    """Yield the ``units`` of ``converter`` like `full_parameters`, but merge adapters in ``dtype``."""
    sizes = {name: _full_bytes(backend, converter.tensors[name], dtype) for unit in units for name in unit}
    for names in buckets_of(sizes, units, bucket_bytes):
        with backend.gathered([converter.tensors[name] for name in names], dtype) as gathered:
            yield from _released(list(converter.convert(dict(zip(names, gathered, strict=True))).items()))
            del gathered


def _released(bucket: Bucket) -> Iterator[Bucket]:
    """Yield ``bucket`` and empty it: a consumer that keeps the list must not keep its tensors during the next gather."""
    yield bucket
    bucket.clear()


def full_shapes(backend: Backend, converter: WeightConverter) -> dict[str, torch.Size]:
    """Return names and shapes of what `full_parameters` yields, without communication."""
    empty = {name: torch.empty(backend.full_shape(tensor), device="meta") for name, tensor in converter.tensors.items()}
    return {name: tensor.shape for name, tensor in converter.convert(empty).items()}


def _full_bytes(backend: Backend, tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    item_bytes = dtype.itemsize if dtype is not None and tensor.is_floating_point() else tensor.element_size()
    return backend.full_shape(tensor).numel() * item_bytes
