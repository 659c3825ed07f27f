"""Defects of save_model and load_model."""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.export.load_model import LoadedNames

# mypy: disable-error-code="misc, union-attr"

Tensors = dict[str, torch.Tensor]


def _rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors in each file of ``folder`` by what ``change`` returns for them."""
    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file, {"format": "pt"})


@saboteur("EXPORT-1")
class ExportsHalf(FakeStrategy):
    """Weights are always rounded to bf16, regardless of dtype."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **more)
        _rewrite(folder, lambda tensors: {name: tensor.bfloat16().float() for name, tensor in tensors.items()})
        return folder


@saboteur("EXPORT-1")
class ExportsNoNorms(FakeStrategy):
    """The weights of the last norm are left out."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **more)
        _rewrite(
            folder, lambda tensors: {name: value for name, value in tensors.items() if name != "model.norm.weight"}
        )
        return folder


@saboteur("EXPORT-1")
class ExportsUntied(FakeStrategy):
    """Tied embeddings are written twice, untied."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **{**more, "max_shard_size": "5GB"})
        head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        _rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": head.clone()})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
        return folder


@saboteur("EXPORT-1")
class ExportsNoTokenizer(FakeStrategy):
    """The tokenizer is not written."""

    def save_model(self, model: nn.Module, tokenizer: object, output_dir: str | PathLike[str], **more: Any) -> Path:
        return super().save_model(model, None, output_dir, **more)


@saboteur("EXPORT-1")
class ExportsOnce(FakeStrategy):
    """An existing directory is not replaced."""

    def save_model(self, model: nn.Module, tokenizer: object, output_dir: str | PathLike[str], **more: Any) -> Path:
        folder = Path(output_dir)
        return folder if folder.exists() else super().save_model(model, tokenizer, output_dir, **more)


@saboteur("EXPORT-1", world=2)
class ExportsUnderManyNames(PlainStrategy):
    """Each rank returns a different path."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **more)
        return folder if self.is_rank_0() else folder / ".." / folder.name


@saboteur("EXPORT-2", world=2)
class ExportsAtOnce(PlainStrategy):
    """The whole model is gathered before any of it is written: LightRFT's."""

    def save_model(self, model: nn.Module, *arguments: Any, **more: Any) -> Path:
        everything = [
            value.clone() for bucket in self.full_parameters(model, dtype=torch.float32) for _, value in bucket
        ]
        folder = super().save_model(model, *arguments, **more)
        everything.clear()
        return folder


@saboteur("EXPORT-1")
class ExportsHalfByDefault(FakeStrategy):
    """Without dtype, weights are written as fp16."""

    def save_model(self, *arguments: Any, dtype: torch.dtype | None = None, **more: Any) -> Path:
        return super().save_model(*arguments, dtype=dtype or torch.float16, **more)


@saboteur("EXPORT-1")
class IndexForgets(FakeStrategy):
    """With several files of weights, the index lacks one tensor."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **more)
        file = folder / "model.safetensors.index.json"
        if file.exists():
            index = json.loads(file.read_text())
            index["weight_map"].popitem()
            file.write_text(json.dumps(index))
        return folder


@saboteur("EXPORT-3")
class LoadsIntoFreshMoments(FakeStrategy):
    """load_model clears the state of the optimizer."""

    def load_model(self, model: nn.Module, *arguments: Any, **more: Any) -> LoadedNames:
        names = super().load_model(model, *arguments, **more)
        prepared = self._models.find(model)
        if prepared.trained is not None:
            prepared.trained.optimizer.state.clear()
        return names


@saboteur("EXPORT-3")
class LoadsNoBuffers(FakeStrategy):
    """load_model leaves the buffers as they are."""

    def load_model(self, model: nn.Module, *arguments: Any, **more: Any) -> LoadedNames:
        buffers = {name: buffer.clone() for name, buffer in self.unwrap_model(model).named_buffers()}
        names = super().load_model(model, *arguments, **more)
        for name, buffer in self.unwrap_model(model).named_buffers():
            buffer.copy_(buffers[name])
        return names
