"""What a rank does in `test_deepspeed_models`."""

from typing import Any

import ds_cases
import pytest
import torch
from ds_models import Observed, Program
from torch import nn

transformers = pytest.importorskip("transformers")


def llama(tied: bool = True) -> Any:
    """A tiny Llama, the same each time."""
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return transformers.LlamaForCausalLM(config)


class Actor(nn.Module):
    """A wrapper with `.model`, as LightRFT's actors are; it gives logits."""

    is_actor = True

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, tokens_BT: torch.Tensor, detour: bool = False) -> torch.Tensor:
        logits_BTV: torch.Tensor = self.model(tokens_BT).logits
        return logits_BTV


def trained(program: Program, checkpointing: str | None, **settings: Any) -> Observed:
    with ds_cases.strategy(program, persist=False, **settings) as made:
        actor: nn.Module = Actor()
        optimizer = made.create_optimizer(actor, lr=1e-3, weight_decay=0.01)
        actor, optimizer, _ = made.prepare((actor, optimizer, None))
        inner = made.unwrap_model(actor)
        if checkpointing is not None:
            inner.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            inner.enable_input_require_grads()
        ds_cases.run(program, made, actor, optimizer)
        return Observed(parameters=ds_cases.whole(made, actor))


def generated(**settings: Any) -> tuple[list[int], list[int]]:
    with ds_cases.strategy(Program(), persist=False, **settings) as made:
        plain = llama()
        prompt = torch.tensor([[1, 5, 9]])
        wanted = plain.generate(prompt, max_new_tokens=5, do_sample=False)
        model, _, _ = made.prepare((plain, made.create_optimizer(plain, lr=1e-3), None))
        with torch.no_grad():
            found = model.generate(prompt, max_new_tokens=5, do_sample=False, synced_gpus=False)
        return wanted.tolist(), found.tolist()
