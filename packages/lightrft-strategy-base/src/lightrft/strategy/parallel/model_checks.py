"""Which models can share their attention over ranks; `prepare` refuses all others."""

from collections import Counter
from typing import Any

from torch import nn

from lightrft.config import UnsupportedOperationError
from lightrft.strategy.parallel.attention import transformers_models

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def check_model(module: nn.Module, ranks: int) -> None:
    """Raise `UnsupportedOperationError`, with the numbers, unless ``ranks`` ranks can share the attention of ``module``."""
    models = list(transformers_models(module))
    if not models:
        raise _refusal(module, ranks, "a model of transformers, whose attention can be replaced", "none")
    if any(part._compiled_call_impl is not None for part in module.modules()):
        raise _refusal(module, ranks, "a model that is not compiled", "torch.compile")
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in getattr(module, "peft_config", {}).values()):
        raise _refusal(module, ranks, "adapters in the layers", "prompt learning, which adds tokens to every slice")
    for model in models:
        _check_transformers_model(model, ranks)


def _check_transformers_model(module: nn.Module, ranks: int) -> None:
    model: Any = module
    config = model.config
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if config.is_encoder_decoder or parts:
        raise _refusal(model, ranks, "a text-only decoder", ", ".join(parts) or "an encoder and a decoder")
    if not (model._can_set_attn_implementation() and model._supports_sdpa):
        raise _refusal(
            model, ranks, "attention through transformers' AttentionInterface", "an implementation of its own"
        )
    heads = config.num_attention_heads
    if heads < ranks:
        raise _refusal(model, ranks, f"at least {ranks} attention heads", f"{heads}")
    others = Counter(
        layer_type for layer_type in getattr(config, "layer_types", None) or () if layer_type not in _LAYER_TYPES
    )
    if others:
        counts = ", ".join(f"{count} of {layer_type}" for layer_type, count in others.items())
        raise _refusal(model, ranks, f"layers of {' or '.join(sorted(_LAYER_TYPES))}", f"{counts}")
    layers = [part for part in model.modules() if hasattr(part, "is_causal") and hasattr(part, "layer_idx")]
    if len(layers) != config.num_hidden_layers:
        raise _refusal(
            model, ranks, f"attention in each of the {config.num_hidden_layers} layers", f"attention in {len(layers)}"
        )
    sinks = [name for name, _ in model.named_parameters() if "sink" in name.rpartition(".")[2]]
    if sinks:
        raise _refusal(model, ranks, "attention without sinks", f"{len(sinks)} parameters such as {sinks[0]}")
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        raise _refusal(model, ranks, "attention without a soft cap", f"attn_logit_softcapping={cap}")
    if getattr(config, "output_router_logits", False):
        raise _refusal(
            model,
            ranks,
            "no load-balancing loss of experts, which would see a slice of the sequence",
            "output_router_logits=True",
        )
    if type(model).__name__.endswith("ForSequenceClassification"):
        raise _refusal(
            model, ranks, "outputs for every token", "one output, of the last token, which only one rank has"
        )


def _refusal(module: nn.Module, ranks: int, expected: str, got: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"prepare: with sp_size={ranks}, expected {expected}, got {got} in {type(module).__name__}. Use sp_size=1, or another model"
    )
