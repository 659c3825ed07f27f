"""Patches of vLLM, and workarounds that leave its code as it is. Importing this module imports no vLLM.

`library.load` checks all `TARGETS` when an engine is built.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lightrft.strategy.patching import Patch, Target, around

_SOURCE = "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm"
VERSIONS = "0.30 to 0.32"


# Patches


def group_numbers(first: int) -> Patch:
    """Have vLLM number its process groups from ``first`` on."""
    return Patch(
        target="vllm.distributed.parallel_state:_group_name_counter",
        replacement=lambda counters: {**counters, "tp": first, "pp": first},
        why="On a CPU the groups' names are those of blocks in /dev/shm, the same for every engine that "
        "external_launcher starts. Of two engines that start at the same time on one host, or one after another that was "
        "killed while starting, the second fails with errno 17.",
        upstream=f"{_SOURCE}/v1/worker/cpu_worker.py#L148",
        versions=VERSIONS,
        until="VLLM_DIST_IDENT is unique to an engine of external_launcher; in 0.32 it is '//'.",
    )


def step_callbacks(before: Callable[[], None], after: Callable[[], None]) -> Patch:
    """Call ``before`` and, if it succeeds, ``after`` each step. To be applied to one engine."""

    def step(original: Callable[[], Any]) -> Any:
        before()
        outputs = original()
        after()
        return outputs

    return Patch(
        target="vllm.v1.engine.llm_engine:LLMEngine.step",
        replacement=around(step),
        why="`LLM.generate` cannot be stopped. An interrupt is safe only between two steps, and an engine that failed in a "
        "step cannot continue.",
        upstream=f"{_SOURCE}/v1/engine/llm_engine.py#L319",
        versions=VERSIONS,
        until="vLLM calls back between the steps of `LLM.generate`, or recovers from a step that failed.",
    )


REPACK_EXPERTS = Patch(
    target="vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase.moe_kernel",
    replacement=lambda kernel: None,
    why="vLLM packs the weights of experts for the CPU's kernel only if there is no kernel yet, so a reload leaves "
    "them unpacked. Without a kernel it packs them and makes a new one. To be applied to one method on the CPU.",
    upstream=f"{_SOURCE}/model_executor/layers/fused_moe/unquantized_fused_moe_method.py#L187",
    versions=VERSIONS,
    until="a reload on the CPU packs experts again.",
)
PATCHES = (group_numbers(0), step_callbacks(lambda: None, lambda: None), REPACK_EXPERTS)


# Workarounds


def repack_experts(model: nn.Module) -> None:
    """Apply `REPACK_EXPERTS` to all experts on the CPU."""
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        has_kernel = getattr(method, "moe_kernel", None) is not None
        if has_kernel and not any(parameter.is_cuda for parameter in layer.parameters()):
            REPACK_EXPERTS.apply(method)


def layers_with_tied_weights(model: nn.Module) -> Iterator[Any]:
    """Layers whose weight belongs to an earlier layer, such as a tied head; they must be processed after a reload.

    A reload processes a shared weight with its first layer only. On the CPU the other layer keeps a packed copy of the
    old weight: https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/model_loader/reload/layerwise.py
    (0.30 to 0.32). This can go when a reload visits tied layers.
    """
    seen: set[int] = set()
    for layer in model.modules():
        identities = {id(parameter) for parameter in layer.parameters(recurse=False)}
        if identities & seen and hasattr(layer, "quant_method"):
            yield layer
        seen |= identities


def remove_shared_memory_names(first: int) -> None:
    """Remove the names of the blocks in /dev/shm of the groups from ``first`` on, once all ranks have opened them.

    vLLM never removes them:
    https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/distributed/device_communicators/cpu_communicator.py#L237
    (0.30 to 0.32). This can go when it does.
    """
    for block in Path("/dev/shm").glob(f"*:{first}-*-cpushm_*"):
        block.unlink(missing_ok=True)


# What the adapter uses


def _used(module: str, *names: str, parameters: tuple[str, ...] = ()) -> list[Target]:
    return [Target(target=f"vllm{module}:{name}", parameters=parameters) for name in names]


USED = (
    *_used("", "LLM.generate", parameters=("prompts", "sampling_params", "use_tqdm", "tokenization_kwargs")),
    *_used("", "LLM.collective_rpc", parameters=("method", "kwargs")),
    *_used("", "LLM.apply_model", parameters=("func",)),
    *_used("", "LLM.sleep", parameters=("level",)),
    *_used("", "LLM.wake_up", parameters=("tags",)),
    *_used("", "LLM.reset_prefix_cache", "LLM.get_tokenizer", "LLM.llm_engine"),
    *_used(
        ".sampling_params", "SamplingParams.__init__",
        parameters=(
            "n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "stop", "stop_token_ids",
            "ignore_eos", "logprobs", "detokenize", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "skip_special_tokens", "include_stop_str_in_output",
        ),
    ),
    *_used(
        ".engine.arg_utils", "EngineArgs.__init__",
        parameters=(
            "load_format", "distributed_executor_backend", "kv_cache_memory_bytes", "enable_sleep_mode", "logprobs_mode",
        ),
    ),
    *_used(".v1.engine.llm_engine", "LLMEngine.abort_request", parameters=("request_ids", "internal")),
    *_used(
        ".v1.engine.llm_engine", "LLMEngine.reset_mm_cache", "LLMEngine.reset_encoder_cache", "LLMEngine.is_sleeping",
        "LLMEngine.model_config", "LLMEngine.output_processor", "LLMEngine.engine_core",
    ),
    *_used(".v1.engine.output_processor", "OutputProcessor.request_states"),
    *_used(".v1.engine.core_client", "InprocClient.shutdown"),
    *_used(".v1.worker.gpu_worker", "Worker.reload_weights"),
    *_used(".distributed.parallel_state", "cleanup_dist_env_and_memory"),
    *_used(".model_executor.layers.linear", "LinearBase.quant_method"),
    *_used(".model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding.quant_method"),
    *_used(".model_executor.layers.fused_moe.routed_experts", "RoutedExperts.quant_method"),
    *_used(".model_executor.layers.quantization.base_config", "QuantizeMethodBase.process_weights_after_loading"),
)  # fmt: skip
TARGETS = (*PATCHES, *USED)
"""All that must exist."""
