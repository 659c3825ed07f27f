"""From a checkpoint to a Hugging Face directory: offline, in one process, a tensor at a time.

The model is built without weights, from its configuration alone, to know the names and the form in which it is saved.
A checkpoint of a model with adapters becomes a directory of its adapters, as `save_model` makes it.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import files
from lightrft.strategy.checkpoint.layout import MANIFEST
from lightrft.strategy.checkpoint.store import Store, checkpoints_at
from lightrft.strategy.export import skeletons
from lightrft.strategy.export.forms import unchanged
from lightrft.strategy.export.parts import Part, WholeModel, parts_of
from lightrft.strategy.export.plan import kept_in_fp32
from lightrft.strategy.export.publication import Publication
from lightrft.strategy.export.sources.checkpoint import CheckpointSource
from lightrft.strategy.export.sources.finding import has_adapters, open_source
from lightrft.strategy.export.sources.source import Source, listed
from lightrft.strategy.export.tensor_files import TensorWriter, file_layouts
from lightrft.strategy.rollout.saved_form import SavedForm, all_tensors

_CONFIGURATION = "config.json"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)(\.index\.json)?$")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to make of what."""

    checkpoint: Path
    """A checkpoint, the directory of several, or another directory of weights."""
    output: Path
    base: Path | None = None
    """The model that training began from: its tokenizer, and what else stands beside weights, is copied."""
    tag: str | None = None
    """Which of several checkpoints; None: the newest."""
    model: str | None = None
    """Which of several models in it."""
    dtype: torch.dtype | None = None
    """Of floating tensors; None: as they are."""
    shard_bytes: int
    allow_pickle: bool = False
    trust_remote_code: bool = False
    """Run the code that stands in ``base``, for models that are not transformers' own."""

    def run(self) -> Path:
        """Write the directory, and return its path. Raises `CheckpointError` where that cannot be, and writes nothing."""
        base = None if self.base is None else _checked(self.base.expanduser())
        source = self._source()
        facts = source.facts if isinstance(source, CheckpointSource) else {}
        publication = Publication(self.output.expanduser().resolve())
        try:
            _copy_companions([base, source.place if source.names == "saved" else None], publication.folder)
            _write_texts(facts.get("configuration", {}), publication.folder)
            model = self._model(source, facts, publication.folder)
            for part in _parts(source, model):
                self._write(source, part, publication)
            if facts.get("adapters"):
                _remove(facts["configuration"], publication.folder)  # the base model's, which is elsewhere
            publication.publish()
        finally:
            publication.discard()
        return publication.target

    def _source(self) -> Source:
        place = self.checkpoint.expanduser()
        if (place / MANIFEST).exists():
            return CheckpointSource(place, self.model)
        if checkpoints_at(place):
            return CheckpointSource(Store(place).find(self.tag), self.model)
        source = open_source(place / self.tag if self.tag else place, allow_pickle=self.allow_pickle)
        if has_adapters(source.place):
            raise CheckpointError(f"{source.place} holds adapters as PEFT opens them already; use it as it is")
        return source

    def _model(self, source: Source, facts: Mapping[str, Any], folder: Path) -> nn.Module:
        """The model that the configuration in ``folder`` describes, with its adapters, on the meta device."""
        if not (folder / _CONFIGURATION).exists():
            what = f"a {facts['class']}" if facts else f"tensors such as {', '.join(list(source.contents)[:3])}"
            raise CheckpointError(
                f"{source.place} holds {what}, and no configuration of a transformers model, without which nothing opens "
                f"what would be written; give the model that training began from with --base"
            )
        model = skeletons.model_of(folder, trust_remote_code=self.trust_remote_code)
        return skeletons.with_adapters(model, facts.get("adapters", {}))

    def _write(self, source: Source, part: Part, publication: Publication) -> None:
        form, folder = part.form, publication.folder / part.folder
        stored = _stored_names(source, part.module, part.form.tensors)
        planned = form.convert({name: self._planned(name, source.contents[it], part) for name, it in stored.items()})
        nbytes = sum(tensor.nbytes for tensor in planned.values())
        publication.check_space(nbytes)
        folder.mkdir(exist_ok=True)
        part.write_configuration(folder, planned)
        layouts = file_layouts(planned, part.stem, self.shard_bytes if part.splits else nbytes)
        with TensorWriter(folder, layouts) as writer, source.opened():
            for unit in form.units:
                for name, tensor in form.convert({it: source.read(stored[it]) for it in unit}).items():
                    writer.write(name, tensor)
            writer.finish()

    def _planned(self, name: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        kept = kept_in_fp32(part.module, self.dtype)
        return tensor.to(torch.float32 if kept is not None and kept.search(name) else self.dtype)


# What stands beside the weights


def _checked(base: Path) -> Path:
    if not (base / _CONFIGURATION).is_file():
        raise CheckpointError(f"--base: {base} has no {_CONFIGURATION}; give the directory of a transformers model")
    return base


def _copy_companions(places: Sequence[Path | None], folder: Path) -> None:
    """All that is no weights, of directories of models; what is in several of them, from the last one."""
    with files.naming(folder, "cannot write"):
        for path in (it for place in places if place is not None for it in place.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not _WEIGHTS.match(path.name):
                shutil.copyfile(path, folder / path.name)


def _write_texts(texts: Mapping[str, str], folder: Path) -> None:
    with files.naming(folder, "cannot write"):
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def _remove(names: Mapping[str, str], folder: Path) -> None:
    for name in names:
        (folder / name).unlink()


# The names of the weights


def _parts(source: Source, model: nn.Module) -> Sequence[Part]:
    if source.names == "in memory":
        return parts_of(model, model, type(model))
    if not (source.place / _CONFIGURATION).exists():  # it did not come with the weights, and may be another model's
        form = SavedForm.of(model)
        _stored_names(source, model, form.convert(form.tensors))
    return [WholeModel(form=unchanged(source.contents), module=model, kind=type(model))]


def _stored_names(source: Source, model: nn.Module, wanted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The names in ``source`` of what is ``wanted``; a tied tensor may be there under another of its names.

    Raises `CheckpointError` where ``source`` does not hold the model.
    """
    if source.contents is wanted:
        return {name: name for name in wanted}
    aliases: dict[int, list[str]] = {}
    for name, tensor in all_tensors(model):
        aliases.setdefault(id(tensor), []).append(name)
    found = {
        name: next((it for it in (name, *aliases.get(id(tensor), ())) if it in source.contents), None)
        for name, tensor in wanted.items()
    }
    missing = [name for name, it in found.items() if it is None]
    unexpected = sorted(source.contents.keys() - wanted.keys() - {it for names in aliases.values() for it in names})
    differing = [name for name, it in found.items() if it and source.contents[it].shape != wanted[name].shape]
    if missing or unexpected or differing:
        raise CheckpointError(
            f"{source.place} does not hold the {type(model).__name__} of the configuration: {listed('not there', missing)}"
            f"{listed('only there', unexpected)}{listed('of another shape', differing)}{_remedy(unexpected)}"
        )
    return {name: it for name, it in found.items() if it is not None}


def _remedy(unexpected: Sequence[str]) -> str:
    if any(".lora_" in name or ".base_layer." in name for name in unexpected):
        return "it is of a model with adapters: load it into that model with load_model, and write it with save_model"
    return (
        "give the model that training began from with --base; what is of a class of your own, such as a critic with a value "
        "head, is loaded into that, with load_ckpt or load_model"
    )
