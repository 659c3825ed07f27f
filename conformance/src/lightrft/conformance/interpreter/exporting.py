"""Operations that write models for transformers to open."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lightrft.conformance import models
from lightrft.conformance.driver.scratch import scratch
from lightrft.conformance.interpreter import memory
from lightrft.conformance.interpreter.session import Session, operation

VOCABULARY = {f"t{number}": number for number in range(models.VOCABULARY)}


def _place() -> Path:
    """Where the models are."""
    return scratch("models")


@operation
def discard_exports(session: Session) -> None:
    """Have nothing there."""
    if session.rank == 0:
        shutil.rmtree(_place(), ignore_errors=True)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(VOCABULARY, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")


@operation
def export(session: Session, model: str, batch: int, shard: str = "5GB") -> dict[str, Any]:
    """save_model; what transformers then makes of the directory, on every rank, and the model's own logits."""
    strategy, entry = session.strategy, session.models[model]
    path = strategy.save_model(entry.model, _tokenizer(), _place() / "model", max_shard_size=shard)
    inputs, _ = models.batch(batch, 0, 2, language=True)
    with torch.no_grad():
        own = models.logits_of(entry.model, inputs.to(strategy.device)).float().cpu()
    try:
        return {"path": str(path), "own": own, **_opened(path, inputs)}
    finally:
        strategy.all_reduce(torch.zeros(1))  # nobody goes on, and writes there again, while others read


@torch.no_grad()
def _opened(path: Path, inputs: torch.Tensor) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return {
        "logits": opened(inputs).logits,
        "weights": {name: it.detach() for name, it in opened.named_parameters()},
        "tied": opened.get_input_embeddings().weight is opened.get_output_embeddings().weight,
        "vocabulary": dict(sorted(AutoTokenizer.from_pretrained(path).get_vocab().items())),
        "class": json.loads((path / "config.json").read_text())["architectures"],
        "files": sorted(it.name for it in path.glob("*.safetensors")),
    }


@operation
def measured_export(session: Session, model: str) -> int:
    """Bytes that this process held beyond what it held before, at most, during a save_model."""
    strategy, entry = session.strategy, session.models[model]
    place = _place() / "measured"
    strategy.save_model(entry.model, None, place)  # the first one makes what stays: modules, a group's buffers
    before = memory.begin(strategy.device)
    strategy.save_model(entry.model, None, place)
    taken = memory.peak(strategy.device) - before
    strategy.all_reduce(torch.zeros(1))
    return taken
