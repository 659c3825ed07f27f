"""`load_model`, top to bottom: from a directory of weights into a prepared model.

Every rank reads the ranges that it holds; nothing is sent. Files are opened, and names and shapes compared, before anything
changes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lightrft.config import CheckpointError
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.checkpoint.compatibility import listed
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.export.sources.open_source import has_adapters, open_source
from lightrft.strategy.export.sources.source import Source
from lightrft.strategy.models import adapters, state_dict_adapter, weight_stream
from lightrft.strategy.models.registry import PreparedModel
from lightrft.strategy.models.renaming import unchanged
from lightrft.strategy.models.state_dict_adapter import StateDictAdapter
from lightrft.strategy.tensors import grouped

CALL = "load_model"


@dataclass(frozen=True, kw_only=True)
class LoadedNames:
    """Names that `load_model` with ``strict=False`` left out."""

    missing: tuple[str, ...]
    """Names in the model that the directory does not have."""
    unexpected: tuple[str, ...]
    """Names in the directory that the model does not have."""


class ReversibleConverter(weight_stream.WeightConverter, Protocol):
    """A converter that also turns tensors of a checkpoint into those of the model."""

    def restore(self, tensors: Mapping[str, torch.Tensor], /) -> dict[str, torch.Tensor]:
        """Undo `convert`."""


def load_model(
    backend: Backend, consensus: RankConsensus, model: PreparedModel, path: Path, *, strict: bool, allow_pickle: bool
) -> LoadedNames:
    """Read the weights at ``path`` into ``model``. All ranks must call this, and fail together."""
    with consensus.together(CALL, "opening"):
        backend.reshard(model.module)
        source = open_source(path, allow_pickle=allow_pickle)
        loaded = model.exported
        converter = _converter(loaded, source)
        reader = Reader(backend, converter, source)
        left = LoadedNames(
            missing=tuple(reader.missing), unexpected=tuple(_unexpected(loaded.module, converter, reader))
        )
        _check(loaded.module, path, reader, left, strict)
    with consensus.together(CALL, "reading"):
        reader.fill(Target(backend, model.module))
    backend.sync_from_master(model.module)
    return left


def _converter(model: PreparedModel, source: Source) -> ReversibleConverter:
    """Return the converter between ``model`` and the tensors in ``source``."""
    module, meta_model = model.module, model.names_model
    if source.names == "in memory":
        return unchanged(state_dict_adapter.saved_tensors(module))
    if not adapters.has_adapters(module):
        return StateDictAdapter.of(module)
    if not has_adapters(source.path):
        return adapters.base_converter(module, meta_model)
    peft_model: Any = meta_model
    name = source.path.name if source.path.name in peft_model.peft_config else peft_model.active_adapter
    return adapters.adapter_converter(module, meta_model, name)


class Reader:
    """Reads a model's tensors, a unit at a time."""

    def __init__(self, backend: Backend, converter: ReversibleConverter, source: Source) -> None:
        self._converter, self._source = converter, source
        empty = {
            name: torch.empty(backend.full_shape(tensor), device="meta") for name, tensor in converter.tensors.items()
        }
        self.wanted = {name: tensor.shape for name, tensor in converter.convert(empty).items()}
        self._empty = empty

    @property
    def missing(self) -> list[str]:
        """Names that the source does not have."""
        return [name for name in self.wanted if name not in self._source.contents]

    @property
    def unknown(self) -> list[str]:
        """Names that only the source has."""
        return [name for name in self._source.contents if name not in self.wanted]

    @property
    def differing(self) -> Iterator[tuple[str, torch.Size, torch.Size]]:
        """Yield names whose shape in the source differs, with the shape of the model and that of the source."""
        for name, shape in self.wanted.items():
            stored = self._source.contents.get(name)
            if stored is not None and stored.shape != shape:
                yield name, shape, stored.shape

    def fill(self, target: "Target") -> None:
        """Read every complete unit of the source into ``target``."""
        with self._source.opened():
            for unit in self._converter.units:
                names = self._converter.convert({name: self._empty[name] for name in unit}).keys()
                if all(name in self._source.contents for name in names):
                    restored = self._converter.restore({name: self._source.read(name) for name in names})
                    for name in unit:
                        target.write(self._converter.tensors[name], restored[name])


class Target:
    """The tensors of a prepared model, as this rank holds them."""

    def __init__(self, backend: Backend, module: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._shards = grouped((shard.name, shard) for shard in backend.shards(module))

    @torch.no_grad()
    def write(self, tensor: torch.Tensor, full: torch.Tensor) -> None:
        """Write this rank's part of ``full`` to ``tensor``, a parameter or a buffer."""
        name = self._names.get(id(tensor))
        if name is None:
            tensor.copy_(full)
            return
        for shard in self._shards.get(name, ()):
            shard.values.copy_(shard.of(full))


def _unexpected(module: Any, converter: ReversibleConverter, reader: Reader) -> Iterable[str]:
    """Return names that the model does not have, except aliases of tied tensors and names that its class ignores."""
    known = {id(tensor) for tensor in converter.tensors.values()}
    aliases = {name for name, tensor in state_dict_adapter.all_tensors(module) if id(tensor) in known}
    patterns = [re.compile(pattern) for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for name in reader.unknown:
        if name not in aliases and not any(pattern.search(name) for pattern in patterns):
            yield name


def _check(module: nn.Module, path: Path, reader: Reader, left: LoadedNames, strict: bool) -> None:
    class_name = type(module).__name__
    for name, expected, stored in reader.differing:
        raise CheckpointError(
            f"expected {name} to have shape {tuple(expected)}, as in {class_name}, got {tuple(stored)} in {path}. Build the "
            f"model from that directory's configuration"
        )
    if strict and (left.missing or left.unexpected):
        raise CheckpointError(
            f"expected {path} to hold the tensors of {class_name}, got others: {listed('missing', left.missing)}"
            f"{listed('unexpected', left.unexpected)}Load it into the model that was saved, or pass strict=False"
        )
