"""One weight sync into a vLLM model in this process: vLLM's reload session, and what that leaves undone."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightrft.config import EngineError
from lightrft.engines.vllm import patches

if TYPE_CHECKING:
    from vllm import LLM


def reload(llm: "LLM", tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Load a full weight stream into vLLM as one session.

    Args:
        llm: A ``vllm.LLM`` in this process.
        tensors: Names and full weights; all of them.

    Raises:
        EngineError: vLLM did not read the stream to its end, left a weight without values, or kept a cache.
    """
    llm.apply_model(patches.repack_experts)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
    if next(tensors, None) is not None:
        raise EngineError(
            "update_weights: expected vLLM to read the whole weight stream, but it stopped early. Sync again, or set up "
            "a new engine"
        )
    (unfilled,) = llm.apply_model(_process_tied_weights)
    if unfilled:
        raise EngineError(
            f"update_weights: expected a value for every weight of vLLM's model, got none for {len(unfilled)} "
            f"({unfilled[0]} first). Send all weights of the checkpoint"
        )
    reset_caches(llm, "update_weights")


def reset_caches(llm: "LLM", call: str) -> None:
    """Have vLLM drop everything that it computed from earlier prompts. Raises `EngineError` if it does not."""
    if not llm.reset_prefix_cache():
        raise EngineError(f"{call}: expected vLLM to reset its prefix cache, but it did not. Set up a new engine")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def _process_tied_weights(model: nn.Module) -> list[str]:
    """Process layers whose weights were reloaded with another layer. Returns names of weights that have no values."""
    for layer in patches.layers_with_tied_weights(model):
        layer.quant_method.process_weights_after_loading(layer)
    return [name for name, tensor in model.named_parameters() if tensor.is_meta]
