"""Operations that save models for transformers to open."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lightrft.conformance import models
from lightrft.conformance.interpreter import memory
from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.language_models import VOCABULARY
from lightrft.conformance.scratch import scratch

WORDS = {f"t{number}": number for number in range(VOCABULARY)}


def _models_directory() -> Path:
    """The directory of the saved models."""
    return scratch("models")


@operation
def discard_exports(session: Session) -> None:
    """Remove the saved models."""
    if session.rank == 0:
        shutil.rmtree(_models_directory(), ignore_errors=True)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(WORDS, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")


@operation
def save_export(session: Session, model: str, shard: str = "5GB") -> str:
    """save_model with a tokenizer; the path."""
    directory = _models_directory() / "model"
    return str(session.strategy.save_model(session.models[model].model, _tokenizer(), directory, max_shard_size=shard))


@operation
def export(session: Session, model: str, batch: int, shard: str = "5GB") -> dict[str, object]:
    """`save_export`; the model's logits, and what transformers opens from the directory on every rank."""
    strategy, entry = session.strategy, session.models[model]
    path = save_export(session, model, shard)
    inputs, _ = models.batch(batch, 0, 2, language=True)
    with torch.no_grad():
        expected = models.logits_of(entry.model, inputs.to(strategy.device)).float().cpu()
    try:
        return {"path": path, "expected_logits": expected, **_opened(Path(path), inputs)}
    finally:
        strategy.all_reduce(torch.zeros(1))  # wait until all ranks have read, before anything is written there again


@torch.no_grad()
def _opened(path: Path, inputs: torch.Tensor) -> dict[str, object]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(path)
    opened = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    return {
        "logits": opened(inputs).logits,
        "weights": {name: tensor.detach() for name, tensor in opened.named_parameters()},
        "tied": opened.get_input_embeddings().weight is opened.get_output_embeddings().weight,
        "vocabulary": dict(sorted(AutoTokenizer.from_pretrained(path, config=config).get_vocab().items())),
        "class": json.loads((path / "config.json").read_text())["architectures"],
        "files": sorted(file.name for file in path.glob("*.safetensors")),
        **_indexed(path),
    }


def _indexed(path: Path) -> dict[str, object]:
    """The file of each tensor, as it is and as the index says."""
    from safetensors import safe_open

    tensors: dict[str, str] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= dict.fromkeys(opened.keys(), file.name)
    index = path / "model.safetensors.index.json"
    named = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    return {"tensors": dict(sorted(tensors.items())), "index": dict(sorted(named.items()))}


@operation
def save_weights(session: Session, model: str) -> None:
    """save_model, for `load_weights`."""
    session.strategy.save_model(session.models[model].model, None, _models_directory() / "weights")


@operation
def load_weights(session: Session, model: str) -> None:
    """load_model of what `save_weights` saved."""
    session.strategy.load_model(session.models[model].model, _models_directory() / "weights")


@operation
def measured_export(session: Session, model: str) -> int:
    """The bytes that save_model adds to the memory of this process at its peak."""
    strategy, entry = session.strategy, session.models[model]
    directory = _models_directory() / "measured"
    strategy.save_model(entry.model, None, directory)  # the first call loads modules and creates buffers that stay
    before = memory.begin(strategy.device)
    strategy.save_model(entry.model, None, directory)
    added = memory.peak(strategy.device) - before
    strategy.all_reduce(torch.zeros(1))
    return added


@operation
def save_pretrained(session: Session, model: str, part: str = "") -> list[str]:
    """save_pretrained of a prepared model, or of a part of it; the names whose tensors are not those that save_model writes.

    Tensors that either of the two did not write count too.
    """
    from safetensors.torch import load_file

    strategy, entry = session.strategy, session.models[model]
    path = strategy.save_model(entry.model, None, _models_directory() / "whole", dtype=torch.float32)
    wanted = load_file(path / "model.safetensors")
    folder = _models_directory() / f"own-{session.rank}"
    shutil.rmtree(folder, ignore_errors=True)
    saver: Any = strategy.unwrap_model(entry.model)
    try:
        saver.get_submodule(part).save_pretrained(folder)
        file = folder / "model.safetensors"
        if session.rank != 0 and not file.exists():
            return []  # transformers writes on rank 0 only
        written = load_file(file) if file.exists() else {}
    finally:
        strategy.all_reduce(torch.zeros(1))  # wait until all ranks have written and read, before anything is removed
    prefix = f"{part}." if part else ""
    written = {f"{prefix}{name}": tensor for name, tensor in written.items()}
    wanted = {name: tensor for name, tensor in wanted.items() if name.startswith(prefix)}
    equal = {name for name in wanted.keys() & written.keys() if torch.equal(wanted[name], written[name].float())}
    return sorted((wanted.keys() | written.keys()) - equal)
