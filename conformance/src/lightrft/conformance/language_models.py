"""Language models: our own, and tiny ones of transformers."""

from typing import Any, cast

import torch
from torch import nn

from lightrft.conformance.regressors import WIDTH

VOCABULARY = 17


class Mixer(nn.Module):
    """A causal layer: each position sees the mean of the positions up to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normal = self.norm(hidden)
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)[:, None]
        past = normal.cumsum(dim=1) / counts
        result: torch.Tensor = hidden + torch.tanh(self.linear(torch.cat([normal, past], dim=-1)))
        return result


class LanguageModel(nn.Module):
    """(batch, length) tokens to (batch, length, VOCABULARY) logits; the embedding is tied to the head."""

    _no_split_modules = ["Mixer"]

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mixers = nn.ModuleList([Mixer(WIDTH), Mixer(WIDTH)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for mixer in self.mixers:
            hidden = mixer(hidden)
        result: torch.Tensor = 2 * self.head(hidden)
        return result


class Centred(LanguageModel):
    """A language model with a buffer that training changes, and that changes the logits."""

    centre: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.linspace(-1, 1, WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        if self.training:
            self.centre.mul_(0.5).add_(hidden.detach().float().mean(dim=(0, 1)))
        for mixer in self.mixers:
            hidden = mixer(hidden - self.centre.to(hidden.dtype))
        result: torch.Tensor = 2 * self.head(hidden)
        return result


class Policy(LanguageModel):
    """A language model that names its head, takes a mask, and returns what the head computes."""

    factor = 1

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embedding(tokens)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        for mixer in self.mixers:
            hidden = mixer(hidden)
        result: torch.Tensor = self.head(hidden)
        return result if self.factor == 1 else self.factor * result


class ScaledPolicy(Policy):
    """A policy that changes its logits after the head."""

    factor = 3


def llama() -> nn.Module:
    """A tiny Llama with tied embeddings, for engines that only run models of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model


def transformer(name: str, **settings: object) -> nn.Module:
    """A tiny causal language model of transformers, with four heads of one key-value head unless ``settings`` say otherwise."""
    import transformers

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    family, _, head = name.partition(" ")
    config = getattr(transformers, f"{family}Config")(**{**common, **settings})
    model: nn.Module = getattr(transformers, f"{family}For{head or 'CausalLM'}")(config)
    return model


def recomputed() -> nn.Module:
    model: Any = transformer("Llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=18)
    model.gradient_checkpointing_enable()
    model.train()
    return cast(nn.Module, model)
