"""From a directory of weights into a prepared model.

Every rank reads for itself, and of each tensor the range that it holds: nothing is sent. Names and shapes are compared,
and files opened, before anything changes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lightrft.config import CheckpointError
from lightrft.strategy.backend import Backend
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.export import adapters
from lightrft.strategy.export.forms import unchanged
from lightrft.strategy.export.sources.finding import has_adapters, open_source
from lightrft.strategy.export.sources.source import Source, listed
from lightrft.strategy.rollout import saved_form, weights
from lightrft.strategy.rollout.saved_form import SavedForm
from lightrft.strategy.shards import Shard
from lightrft.strategy.training.prepared import PreparedModel

CALL = "load_model"


@dataclass(frozen=True, kw_only=True)
class LoadedNames:
    """What `load_model` with ``strict=False`` left alone."""

    missing: tuple[str, ...]
    """Names in the model that the directory does not have."""
    unexpected: tuple[str, ...]
    """Names in the directory that the model does not have."""


class Form(weights.Form, Protocol):
    """What goes into a model."""

    def restore(self, tensors: Mapping[str, torch.Tensor], /) -> dict[str, torch.Tensor]:
        """The opposite of `convert`."""


def load(
    backend: Backend, collectives: Collectives, model: PreparedModel, path: Path, *, strict: bool, allow_pickle: bool
) -> LoadedNames:
    """Read the weights at ``path`` into ``model``. Every rank calls this, and all raise where one cannot go on."""
    with collectives.together(CALL, CheckpointError):
        backend._settle(model.module)
        source = open_source(path, allow_pickle=allow_pickle)
        form = _form(model, source)
        reader = Reader(backend, form, source)
        left = LoadedNames(missing=tuple(reader.missing), unexpected=tuple(_unexpected(model.module, form, reader)))
        _check(model.module, path, reader, left, strict)
    with collectives.together(CALL, CheckpointError):
        reader.fill(Target(backend, model.module))
    backend._refresh(model.module)
    return left


def _form(model: PreparedModel, source: Source) -> Form:
    """The names under which ``source`` has what ``model`` holds."""
    module, skeleton = model.module, model.skeleton or model.module
    if source.names == "in memory":
        return unchanged(saved_form.saved_tensors(module))
    if not adapters.has_adapters(module):
        return SavedForm.of(module)
    if not has_adapters(source.place):
        return adapters.base_form(module, skeleton)
    known: Any = skeleton
    name = source.place.name if source.place.name in known.peft_config else known.active_adapter
    return adapters.adapter_form(module, skeleton, name)


class Reader:
    """Reads a model's tensors, a unit at a time."""

    def __init__(self, backend: Backend, form: Form, source: Source) -> None:
        self._form, self._source = form, source
        empty = {name: torch.empty(backend._full_shape(tensor), device="meta") for name, tensor in form.tensors.items()}
        self.wanted = {name: tensor.shape for name, tensor in form.convert(empty).items()}
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
        """Names with another shape in the source, with the shape here and there."""
        for name, shape in self.wanted.items():
            there = self._source.contents.get(name)
            if there is not None and there.shape != shape:
                yield name, shape, there.shape

    def fill(self, target: "Target") -> None:
        """Read all that is there into ``target``."""
        with self._source.opened():
            for unit in self._form.units:
                names = self._form.convert({name: self._empty[name] for name in unit}).keys()
                if all(name in self._source.contents for name in names):
                    restored = self._form.restore({name: self._source.read(name) for name in names})
                    for name in unit:
                        target.write(self._form.tensors[name], restored[name])


class Target:
    """The tensors of a prepared model, as this rank holds them."""

    def __init__(self, backend: Backend, module: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._shards: dict[str, list[Shard]] = {}
        for shard in backend._shards(module):
            self._shards.setdefault(shard.name, []).append(shard)

    @torch.no_grad()
    def write(self, tensor: torch.Tensor, whole: torch.Tensor) -> None:
        """Put this rank's part of ``whole`` where it keeps ``tensor``, a parameter or a buffer."""
        name = self._names.get(id(tensor))
        if name is None:
            tensor.copy_(whole)
            return
        for shard in self._shards.get(name, ()):
            shard.values.copy_(shard.of(whole))


def _unexpected(module: Any, form: Form, reader: Reader) -> Iterable[str]:
    """Names that the model does not know; those of tied tensors it does, and some it expects not to."""
    known = {id(tensor) for tensor in form.tensors.values()}
    aliases = {name for name, tensor in saved_form.all_tensors(module) if id(tensor) in known}
    patterns = [re.compile(it) for it in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for name in reader.unknown:
        if name not in aliases and not any(pattern.search(name) for pattern in patterns):
            yield name


def _check(module: nn.Module, path: Path, reader: Reader, left: LoadedNames, strict: bool) -> None:
    kind = type(module).__name__
    for name, here, there in reader.differing:
        raise CheckpointError(
            f"{CALL}: {name} has shape {tuple(here)} in {kind}, and {tuple(there)} in {path}; build the model from that "
            f"directory's configuration"
        )
    if strict and (left.missing or left.unexpected):
        raise CheckpointError(
            f"{CALL}: {path} does not fit {kind}: {listed('not there', left.missing)}{listed('only there', left.unexpected)}"
            f"load it into the model that it was made of, or pass strict=False"
        )
