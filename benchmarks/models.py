"""The model of the benchmarks."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True, "rope_theta": 100000.0,
}  # fmt: skip
"""The shape of SmolLM2-135M."""


def smollm2(dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of SmolLM2-135M's shape with random weights: what is measured here does not depend on their values."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)


def save_smollm2(folder: Path) -> Path:
    """Write that model in bf16 as a Hugging Face directory, for an engine."""
    smollm2(torch.bfloat16).save_pretrained(folder)
    return folder
