"""`lightrft convert`, top to bottom: from a checkpoint to a Hugging Face directory, in one process, a tensor at a time.

The model is built on the meta device, from its configuration, for the names and the form in which it is saved. A checkpoint
of a model with adapters becomes a directory of its adapters, as from `save_model`, or of the whole model with them merged in.
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
from lightrft.strategy.checkpoint.compatibility import listed
from lightrft.strategy.checkpoint.format import MANIFEST
from lightrft.strategy.checkpoint.store import Store, checkpoints_at
from lightrft.strategy.export import meta_models
from lightrft.strategy.export.atomic_directory import AtomicDirectory
from lightrft.strategy.export.parts import ExportPart, WholeModel, export_parts
from lightrft.strategy.export.save_model import kept_in_fp32
from lightrft.strategy.export.sources.lightrft_checkpoint import CheckpointSource
from lightrft.strategy.export.sources.open_source import has_adapters, open_source
from lightrft.strategy.export.sources.source import Source
from lightrft.strategy.export.tensor_files import TensorWriter, file_layouts
from lightrft.strategy.models.renaming import unchanged
from lightrft.strategy.models.state_dict_adapter import StateDictAdapter, all_tensors
from lightrft.strategy.storage import files
from lightrft.strategy.tensors import cast, grouped

_CONFIGURATION = "config.json"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx)(\.index\.json)?$")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The arguments of `lightrft convert`."""

    checkpoint: Path
    """A checkpoint, a directory of several, or another directory of weights."""
    output: Path
    base: Path | None = None
    """Directory of the base model, whose tokenizer and other files except weights are copied."""
    tag: str | None = None
    """Tag of the checkpoint; None: the newest."""
    model: str | None = None
    """Name of the model in the checkpoint; None: the only one."""
    dtype: torch.dtype | None = None
    """Dtype of floating tensors; None: as stored."""
    shard_bytes: int
    allow_pickle: bool = False
    trust_remote_code: bool = False
    """Run the code in ``base``, for models that are not part of transformers."""
    merge_adapters: bool = False
    """Write the whole model with its adapter merged in, instead of the adapters."""

    def run(self) -> Path:
        """Write the directory and return its path. If that is impossible, raise `CheckpointError` and write nothing."""
        base = None if self.base is None else _checked(self.base.expanduser())
        source = self._source()
        facts = source.facts if isinstance(source, CheckpointSource) else {}
        if self.merge_adapters:
            _check_one_adapter(source, facts.get("adapters", {}))
        directory = AtomicDirectory(self.output.expanduser().resolve())
        try:
            _copy_metadata([base, source.path if source.names == "saved" else None], directory.folder)
            _write_texts(facts.get("configuration", {}), directory.folder)
            model = self._model(source, facts, directory.folder)
            for part in _parts(source, model, merge_adapters=self.merge_adapters):
                self._write(source, part, model, directory)
            if facts.get("adapters") and not self.merge_adapters:
                _remove(facts["configuration"], directory.folder)  # of the base model, which is not part of the output
            directory.publish()
        finally:
            directory.discard()
        return directory.target

    def _source(self) -> Source:
        path = self.checkpoint.expanduser()
        if (path / MANIFEST).exists():
            return CheckpointSource(path, self.model)
        if checkpoints_at(path):
            return CheckpointSource(Store(path).find(self.tag), self.model)
        source = open_source(path / self.tag if self.tag else path, allow_pickle=self.allow_pickle)
        if has_adapters(source.path):
            raise CheckpointError(
                f"expected a checkpoint to convert, got {source.path}, a directory of PEFT adapters, which needs no conversion. "
                f"Open it with PeftModel.from_pretrained"
            )
        return source

    def _model(self, source: Source, facts: Mapping[str, Any], folder: Path) -> nn.Module:
        """Return the model of the configuration in ``folder``, with its adapters, on the meta device."""
        if not (folder / _CONFIGURATION).exists():
            got = f"a {facts['class']}" if facts else f"tensors such as {', '.join(list(source.contents)[:3])}"
            raise CheckpointError(
                f"expected the configuration of a transformers model in {source.path}, got {got} without one. Pass the base "
                f"model, from which training started, with --base"
            )
        model = meta_models.model_of(folder, trust_remote_code=self.trust_remote_code)
        return meta_models.with_adapters(model, facts.get("adapters", {}))

    def _write(self, source: Source, part: ExportPart, model: nn.Module, directory: AtomicDirectory) -> None:
        converter, folder = part.converter, directory.folder / part.folder
        stored = _stored_names(source, model, part.converter.tensors)
        planned = converter.convert(
            {name: self._planned(name, source.contents[source_name], part) for name, source_name in stored.items()}
        )
        nbytes = sum(tensor.nbytes for tensor in planned.values())
        directory.check_space(nbytes)
        folder.mkdir(exist_ok=True)
        part.write_configuration(folder, planned)
        layouts = file_layouts(planned, part.stem, self.shard_bytes if part.splits else nbytes)
        with TensorWriter(folder, layouts) as writer, source.opened():
            for unit in converter.units:
                precision = torch.float32 if part.merges(unit) else None
                for name, tensor in converter.convert(
                    {unit_name: cast(source.read(stored[unit_name]), precision) for unit_name in unit}
                ).items():
                    writer.write(name, tensor)
            writer.finish()

    def _planned(self, name: str, tensor: torch.Tensor, part: ExportPart) -> torch.Tensor:
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        kept = kept_in_fp32(part.module, self.dtype)
        return tensor.to(torch.float32 if kept is not None and kept.search(name) else self.dtype)


# Files other than the weights


def _checked(base: Path) -> Path:
    if not (base / _CONFIGURATION).is_file():
        raise CheckpointError(
            f"expected --base to be the directory of a transformers model, got {base}, "
            f"which has no {_CONFIGURATION}. Pass the directory that training started from"
        )
    return base


def _check_one_adapter(source: Source, adapters: Mapping[str, object]) -> None:
    """Raise `CheckpointError` unless there is one adapter: a checkpoint does not say which of several is active."""
    if len(adapters) != 1:
        raise CheckpointError(
            f"expected a checkpoint of a model with one adapter for --merge-adapters, got {source.path} with "
            f"{', '.join(adapters) or 'none with a known configuration'}. Convert it without --merge-adapters, or load it "
            f"into the model and write that with save_model(..., merge_adapters=True)"
        )


def _copy_metadata(models: Sequence[Path | None], folder: Path) -> None:
    """Copy everything but weights from the directories of ``models``; later ones replace earlier ones."""
    with files.explain_os_errors(folder, "cannot write"):
        for path in (file for model in models if model is not None for file in model.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not _WEIGHTS.match(path.name):
                shutil.copyfile(path, folder / path.name)


def _write_texts(texts: Mapping[str, str], folder: Path) -> None:
    with files.explain_os_errors(folder, "cannot write"):
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def _remove(names: Mapping[str, str], folder: Path) -> None:
    for name in names:
        (folder / name).unlink()


# Names of the weights


def _parts(source: Source, model: nn.Module, *, merge_adapters: bool) -> Sequence[ExportPart]:
    if source.names == "in memory":
        return export_parts(model, model, type(model), merge_adapters=merge_adapters)
    if not (source.path / _CONFIGURATION).exists():  # from --base, and perhaps of another model
        converter = StateDictAdapter.of(model)
        _stored_names(source, model, converter.convert(converter.tensors))
    return [WholeModel(converter=unchanged(source.contents), module=model, model_class=type(model), generates=model)]


def _stored_names(source: Source, model: nn.Module, wanted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the names in ``source`` of the ``wanted`` tensors; tied tensors may be there under an alias.

    Raises:
        CheckpointError: ``source`` does not hold the model.
    """
    if source.contents is wanted:
        return {name: name for name in wanted}
    aliases = grouped((id(tensor), name) for name, tensor in all_tensors(model))
    stored = {
        name: next((alias for alias in (name, *aliases.get(id(tensor), ())) if alias in source.contents), None)
        for name, tensor in wanted.items()
    }
    missing = [name for name, stored_name in stored.items() if stored_name is None]
    unexpected = sorted(
        source.contents.keys() - wanted.keys() - {alias for names in aliases.values() for alias in names}
    )
    differing = [
        name
        for name, source_name in stored.items()
        if source_name and source.contents[source_name].shape != wanted[name].shape
    ]
    if missing or unexpected or differing:
        raise CheckpointError(
            f"expected {source.path} to hold the {type(model).__name__} of the configuration, got other tensors: "
            f"{listed('missing', missing)}{listed('unexpected', unexpected)}{listed('of another shape', differing)}"
            f"{_remedy(unexpected)}"
        )
    return {name: stored_name for name, stored_name in stored.items() if stored_name is not None}


def _remedy(unexpected: Sequence[str]) -> str:
    if any(".lora_" in name or ".base_layer." in name for name in unexpected):
        return "It has adapters: load it into a model with adapters with load_model, and write that with save_model"
    return (
        "Pass the base model, from which training started, with --base. A model of your own class, such as a critic with a "
        "value head, is not converted: load it into that class with load_ckpt or load_model"
    )
