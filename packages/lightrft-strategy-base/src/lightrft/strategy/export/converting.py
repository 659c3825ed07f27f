"""From a checkpoint to a Hugging Face directory: offline, in one process, a tensor at a time.

The model is built without weights, from its configuration alone, to know the names and the form in which it is saved.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightrft.config import BackendNotInstalledError, CheckpointError
from lightrft.strategy.checkpoint import files
from lightrft.strategy.checkpoint.layout import MANIFEST
from lightrft.strategy.checkpoint.store import Store, checkpoints_at
from lightrft.strategy.export import companions
from lightrft.strategy.export.forms import unchanged
from lightrft.strategy.export.plan import kept_in_fp32
from lightrft.strategy.export.publication import Publication
from lightrft.strategy.export.sources.checkpoint import CheckpointSource
from lightrft.strategy.export.sources.finding import open_source
from lightrft.strategy.export.sources.source import Source
from lightrft.strategy.export.tensor_files import TensorWriter, file_layouts
from lightrft.strategy.rollout.saved_form import SavedForm, all_tensors, tied_aliases
from lightrft.strategy.rollout.weights import Form

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
        source = self._source()
        publication = Publication(self.output.expanduser().resolve())
        try:
            self._copy_companions(source, publication.folder)
            model = self._model(publication.folder)
            self._write(source, model, publication)
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
        return open_source(place / self.tag if self.tag else place, allow_pickle=self.allow_pickle)

    def _copy_companions(self, source: Source, folder: Path) -> None:
        """What stands beside the weights: from ``base``, and from the checkpoint, which knows it as of its saving."""
        base = self.base or (source.place if source.names == "saved" else None)
        with files.naming(folder, "cannot write"):
            for path in base.expanduser().iterdir() if base is not None else ():
                if path.is_file() and not path.name.startswith(".") and not _WEIGHTS.match(path.name):
                    shutil.copyfile(path, folder / path.name)
            for name, text in (
                source.facts.get("configuration", {}) if isinstance(source, CheckpointSource) else {}
            ).items():
                (folder / name).write_text(text, encoding="utf-8")

    def _model(self, folder: Path) -> Any:
        """The model that the configuration in ``folder`` describes, on the meta device; None where there is none."""
        if not (folder / "config.json").exists():
            return None
        try:
            import transformers
        except ImportError as error:
            raise BackendNotInstalledError(
                "the names of a transformers model are transformers' to know; install it with: "
                "pip install 'lightrft-strategy-base[transformers]'"
            ) from error
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
        name = (config.architectures or ["none"])[0]
        kind = getattr(transformers, name, None)
        with torch.device("meta"):
            if kind is not None:
                return kind._from_config(config)
            for auto in (it for key, it in vars(transformers).items() if key.startswith("AutoModel")):
                if auto.__name__ in getattr(config, "auto_map", {}):
                    return auto.from_config(config, trust_remote_code=self.trust_remote_code)
        raise CheckpointError(
            f"{self.checkpoint} is of a {name}, which transformers {transformers.__version__} does not have; give the model "
            f"that brings its code with --base and --trust-remote-code"
        )

    def _write(self, source: Source, model: Any, publication: Publication) -> None:
        form: Form = unchanged(source.contents)
        if model is not None and source.names == "in memory":
            form = SavedForm.of(model)
        stored = _stored_names(form, model, source)
        planned = form.convert({name: self._planned(name, source.contents[it], model) for name, it in stored.items()})
        publication.check_space(sum(tensor.nbytes for tensor in planned.values()))
        if model is not None:
            dtype = next((tensor.dtype for tensor in planned.values() if tensor.is_floating_point()), None)
            untied = not tied_aliases(model).isdisjoint(planned)
            companions.write_configuration(model, type(model), dtype, publication.folder, untied=untied)
        layouts = file_layouts(planned, "model", self.shard_bytes)
        with TensorWriter(publication.folder, layouts) as writer, source.opened():
            for unit in form.units:
                for name, tensor in form.convert({it: source.read(stored[it]) for it in unit}).items():
                    writer.write(name, tensor)
            writer.finish()

    def _planned(self, name: str, tensor: torch.Tensor, model: Any) -> torch.Tensor:
        if self.dtype is None or not tensor.is_floating_point():
            return tensor
        kept = kept_in_fp32(model, self.dtype)
        return tensor.to(torch.float32 if kept is not None and kept.search(name) else self.dtype)


def _stored_names(form: Form, model: Any, source: Source) -> dict[str, str]:
    """The names in ``source``, by those in memory; a tied tensor may be there under another of its names.

    Raises `CheckpointError` where ``source`` does not hold the model.
    """
    aliases: dict[int, list[str]] = {}
    for name, tensor in all_tensors(model) if model is not None else form.tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    found = {
        name: next((it for it in (name, *aliases[id(tensor)]) if it in source.contents), None)
        for name, tensor in form.tensors.items()
    }
    missing = [name for name, it in found.items() if it is None]
    known = {it for tensor in form.tensors.values() for it in aliases[id(tensor)]}
    unexpected = [name for name in source.contents if name not in known]
    differing = [name for name, it in found.items() if it and source.contents[it].shape != form.tensors[name].shape]
    for what, names in (("are missing", missing), ("are not the model's", unexpected), ("differ in shape", differing)):
        if names:
            raise CheckpointError(
                f"{source.place} does not hold the {type(model).__name__} of the configuration: {', '.join(names[:3])} "
                f"({len(names)} in all) {what}; give the model that training began from with --base"
            )
    return {name: it for name, it in found.items() if it is not None}
