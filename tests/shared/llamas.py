"""A tiny language model of transformers: bare, as an actor, and with a fused loss."""

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")


def llama(tied: bool = True) -> Any:
    """A Llama, the same each time."""
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return transformers.LlamaForCausalLM(config)


def falcon() -> Any:
    """A Falcon, which does not look for packed sequences; the same each time."""
    config = transformers.FalconConfig(vocab_size=17, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return transformers.FalconForCausalLM(config)


def with_adapter() -> Any:
    """A Llama with a LoRA adapter, the same each time."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(8)
        settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        return peft.get_peft_model(llama(), settings)


class Actor(nn.Module):
    """A wrapper with `.model`, as LightRFT's actors are; it gives logits."""

    is_actor = True

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, tokens_BT: torch.Tensor, detour: bool = False) -> torch.Tensor:
        logits_BTV: torch.Tensor = self.model(tokens_BT).logits
        return logits_BTV


class FusedLoss(nn.Module):
    """Multiplies by the weight of the head itself, as fused losses do."""

    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self) -> None:
        super().__init__()
        self.model = llama(tied=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden_BTH = self.model.model(input_ids=input_ids).last_hidden_state
        logits_BTV = hidden_BTH @ self.model.lm_head.weight.T
        loss = nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss)
