"""One weight sync into a vLLM model in this process: vLLM's reload session, and what it leaves undone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lightrft.config import EngineError


def reload(llm: Any, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Have vLLM take a whole stream as one session. Raises `EngineError` where weights or caches are not renewed."""
    llm.apply_model(_forget_packed_experts)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    if next(tensors, None) is not None:
        raise EngineError("vLLM left a part of the weight stream unread")
    (unfilled,) = llm.apply_model(_renewed)
    if unfilled:
        raise EngineError(f"vLLM's reload left {len(unfilled)} weights without values, {unfilled[0]} first")
    forget(llm)


def forget(llm: Any) -> None:
    """Have vLLM drop all that it keeps of earlier prompts. Raises `EngineError` where it does not."""
    if not llm.reset_prefix_cache():
        raise EngineError("vLLM would not reset its prefix cache, which no longer holds what the weights compute")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def _forget_packed_experts(model: nn.Module) -> None:
    """Have vLLM pack experts again as at its start: on a CPU a reload leaves them as they came. Seen in 0.32."""
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and not any(it.is_cuda for it in layer.parameters()):
            method.moe_kernel = None


def _renewed(model: nn.Module) -> list[str]:
    """Renew what vLLM made from weights that another layer's reload renewed; names of weights that have no values."""
    for layer in _layers_with_tied_weights(model):
        layer.quant_method.process_weights_after_loading(layer)
    return [name for name, tensor in model.named_parameters() if tensor.is_meta]


def _layers_with_tied_weights(model: nn.Module) -> Iterator[Any]:
    """Layers whose weight is first another's, such as a tied head.

    vLLM reloads such a weight with the layer that it belongs to, and on a CPU leaves the other's own packed copy of
    it as it was. Seen in 0.32; a reload that visits tied layers makes this superfluous.
    """
    seen: set[int] = set()
    for layer in model.modules():
        own = {id(it) for it in layer.parameters(recurse=False)}
        if own & seen and hasattr(layer, "quant_method"):
            yield layer
        seen |= own
