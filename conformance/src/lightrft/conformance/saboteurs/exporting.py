"""Defects of models that leave."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy

# mypy: disable-error-code="misc"


def _rewrite(folder: Path, change: Any) -> None:
    """Put what ``change`` makes of its tensors in each file of ``folder``."""
    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file, {"format": "pt"})


@saboteur("EXPORT-1")
class ExportsHalf(FakeStrategy):
    """Weights are written as bf16 holds them, whatever type was asked for."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **more)
        _rewrite(folder, lambda tensors: {name: it.bfloat16().float() for name, it in tensors.items()})
        return folder


@saboteur("EXPORT-1")
class ExportsNoNorms(FakeStrategy):
    """The last norm is left out, and begins anew where the model is opened."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **more)
        _rewrite(folder, lambda tensors: {name: it for name, it in tensors.items() if name != "model.norm.weight"})
        return folder


@saboteur("EXPORT-1")
class ExportsUntied(FakeStrategy):
    """Tied embeddings are written twice, and come apart."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **{**more, "max_shard_size": "5GB"})
        head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        _rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": head.clone()})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
        return folder


@saboteur("EXPORT-1")
class ExportsNoTokenizer(FakeStrategy):
    """The tokenizer stays behind."""

    def save_model(self, model: Any, tokenizer: Any, output_dir: Any, **more: Any) -> Path:
        return super().save_model(model, None, output_dir, **more)


@saboteur("EXPORT-1")
class ExportsOnce(FakeStrategy):
    """A directory that is there is left as it is."""

    def save_model(self, model: Any, tokenizer: Any, output_dir: Any, **more: Any) -> Path:
        there = Path(output_dir)
        return there if there.exists() else super().save_model(model, tokenizer, output_dir, **more)


@saboteur("EXPORT-1", world=2)
class ExportsUnderManyNames(PlainStrategy):
    """Each rank has a name of its own for where the model is."""

    def save_model(self, *arguments: Any, **more: Any) -> Path:
        folder = super().save_model(*arguments, **more)
        return folder if self.is_rank_0() else folder / ".." / folder.name


@saboteur("EXPORT-2", world=2)
class ExportsAtOnce(PlainStrategy):
    """The whole model is copied before any of it is written: LightRFT's."""

    def save_model(self, model: Any, *arguments: Any, **more: Any) -> Path:
        everything = [it.clone() for bucket in self.full_parameters(model, dtype=torch.float32) for _, it in bucket]
        folder = super().save_model(model, *arguments, **more)
        everything.clear()
        return folder
