"""What a rank does in the tests of saving and loading models, on any strategy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from llamas import llama, with_adapter
from programs import tokens
from torch import nn
from workers import Workers

from lightrft.config import CheckpointError
from lightrft.strategy import StrategyBase
from lightrft.strategy.strategy import strategy_class

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()  # its monitor is a thread that stays
TOKENS = torch.tensor([[1, 5, 9, 3]])


@contextmanager
def opened(strategy: str, **settings: Any) -> Iterator[StrategyBase]:
    """A strategy by name, closed in the end."""
    batch = int(os.environ.get("WORLD_SIZE", "1"))
    with strategy_class(strategy)(device="cpu", **{"train_batch_size": batch, "bf16": False, **settings}) as made:
        yield made


def in_training(made: StrategyBase, model: nn.Module, updates: int = 0) -> tuple[nn.Module, Any]:
    """``model`` prepared for training, after some updates."""
    optimizer = made.create_optimizer(model, lr=1e-2, weight_decay=0.01)
    model, optimizer, _ = made.prepare((model, optimizer, None))
    for update in range(updates):
        inputs_BT = tokens(update, made.get_rank())
        loss = model(input_ids=inputs_BT, labels=inputs_BT).loss
        made.backward(loss, model, optimizer)
        made.optimizer_step(optimizer, model)
    return model, optimizer


def saved(strategy: str, path: str, build: Any = llama, save: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Save a trained model to ``path``; its weights in fp32, and its logits."""
    with opened(strategy, **settings) as made:
        model, _ = in_training(made, build(), updates=1)
        written = made.save_model(model, None, path, **{"dtype": torch.float32, **(save or {})})
        with torch.no_grad():
            logits_BTV = model(TOKENS).logits
        return str(written), training.full_parameters(made, model), logits_BTV.float()


def vision() -> Any:
    """A small vision-language model, whose names in memory are not those on disk."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small, "vocab_size": 16, "intermediate_size": 32, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    sight = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=sight))


def names(strategy: str, path: str) -> tuple[set[str], str]:
    """The names of the weights of `vision` in a sync, and where it was saved."""
    with opened(strategy) as made:
        model, _ = in_training(made, vision(), updates=0)
        names_seen = {name for bucket in made.full_parameters(model) for name, _ in bucket}
        return names_seen, str(made.save_model(model, None, path))


def checkpointed(strategy: str, path: str, **settings: Any) -> dict[str, torch.Tensor]:
    """Save a checkpoint of a trained model to ``path``; its weights."""
    with opened(strategy, **settings) as made:
        model, _ = in_training(made, llama(), updates=1)
        made.save_ckpt(model, path, tag="t")
        return training.full_parameters(made, model)


def check_adapter_export(ranks: Workers, directory: Path, *, merge: bool, strategy: str, **settings: Any) -> None:
    """A model with an adapter, saved on ``ranks``, gives the same logits when peft, or transformers if merged, opens it."""
    peft = pytest.importorskip("peft")
    saving = {
        "strategy": strategy,
        "path": str(directory / "out"),
        "build": with_adapter,
        "save": {"merge_adapters": merge},
    }
    (path, _, logits_BTV), *_ = ranks.run(saved, **saving, **settings)
    if merge:
        opened_model = transformers.AutoModelForCausalLM.from_pretrained(path)
    else:
        assert [file.name for file in Path(path).glob("*.safetensors")] == ["adapter_model.safetensors"]
        opened_model = peft.PeftModel.from_pretrained(llama(), path)
    with torch.no_grad():
        assert (opened_model(TOKENS).logits - logits_BTV).abs().max() <= 1e-5


def loaded(strategy: str, path: str, build: Any = llama, **settings: Any) -> Any:
    """Load ``path`` into a model in training; its weights in fp32 and its logits, and its weights after an update."""
    with opened(strategy, **settings) as made:
        model, optimizer = in_training(made, build())
        made.load_model(model, path)
        with torch.no_grad():
            logits_BTV = model(TOKENS).logits
        weights = training.full_parameters(made, model)
        made.backward(model(input_ids=TOKENS, labels=TOKENS).loss, model, optimizer)
        made.optimizer_step(optimizer, model)
        return weights, logits_BTV.float(), training.full_parameters(made, model)


def refused(strategy: str, path: str, call: str, **settings: Any) -> tuple[str, str, bool]:
    """What ``call`` with ``path`` raises, its text, and whether the weights are as before."""
    with opened(strategy, **settings) as made:
        model, _ = in_training(made, llama())
        before = training.full_parameters(made, model)
        with pytest.raises(CheckpointError) as error:
            made.save_model(model, None, path) if call == "save" else made.load_model(model, path)
        after = training.full_parameters(made, model)
        return (
            type(error.value).__name__,
            str(error.value),
            all(torch.equal(after[name], tensor) for name, tensor in before.items()),
        )


def from_pretrained_on_rank_0(strategy: str, path: str, in_training: bool, **settings: Any) -> Any:
    """Load ``path`` with transformers where only rank 0 gets memory: where it was, the weights, and the logits."""
    with opened(strategy, **settings) as made:
        with made.init_model_context(meta_init=True):
            model = transformers.AutoModelForCausalLM.from_pretrained(Path(path))
        kinds = {parameter.device.type for parameter in model.parameters()}
        if in_training:
            model, _, _ = made.prepare((model, made.create_optimizer(model, lr=1e-3), None))
        else:
            model = made.prepare_model(model)
        with torch.no_grad():
            logits_BTV = model(TOKENS).logits
        buffers = {name: buffer.clone() for name, buffer in made.unwrap_model(model).named_buffers()}
        return kinds, training.full_parameters(made, model), buffers, logits_BTV.float()
