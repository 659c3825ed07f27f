"""Small models of transformers, of the kinds that are saved in different ways."""

from functools import wraps

import torch
import tqdm
import transformers

tqdm.tqdm.monitor_interval = 0  # its monitor is a thread that stays
TOKENS = torch.tensor([[1, 5, 9, 3]])
_SIZES = {
    "vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip


def _the_same_each_time(build):
    @wraps(build)
    def seeded(*args, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return build(*args, **kwargs)

    return seeded


@_the_same_each_time
def llama(tied=True, biases=False):
    """Saved as it is; with its embeddings tied, or not."""
    config = transformers.LlamaConfig(**_SIZES, tie_word_embeddings=tied, attention_bias=biases)
    return transformers.LlamaForCausalLM(config).eval()


@_the_same_each_time
def mixture_of_experts():
    """Experts are fused in memory, and single in files."""
    config = transformers.Qwen3MoeConfig(
        **_SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=1
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


@_the_same_each_time
def vision_language():
    """Names in memory have other prefixes than in files."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**_SIZES), image_token_index=16
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def same_logits(one, other):
    """Whether two models say the same, to the last bit."""
    with torch.no_grad():
        return torch.equal(one.eval()(TOKENS).logits, other.eval()(TOKENS).logits)
