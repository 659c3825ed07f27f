"""Patches of SGLang. Importing this module imports no SGLang.

`library.load` checks all `TARGETS` in the server process, before an engine starts. SGLang's own registry of hooks is not
used: if the target of a hook is missing, it only logs that.

Shapes: B sequences of a batch, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightrft.engines.sglang.host_memory import HostMemory, cache_tensors
from lightrft.engines.sglang.seeded_sampling import draw, filtered
from lightrft.strategy.patching import Patch, Target, around

_SOURCE = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt"
VERSIONS = "0.5.21 to 0.5.23"


def _after(hook: Callable[..., None]) -> Callable[[Any], Any]:
    """A replacement for a function that calls ``hook(result, *args, **kwargs)`` after it."""

    def call(original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        result = original(*args, **kwargs)
        hook(result, *args, **kwargs)
        return result

    return around(call)


# Files and failures

LOAD_FILE = Patch(
    target="sglang.srt.managers.load_snapshot:shm_path_for",
    replacement=around(lambda original, name: f"{os.environ['TMPDIR']}/{Path(original(name)).name}"),
    why="SGLang never removes the file in /dev/shm by which its processes report their load. Among the server's temporary "
    "files it is removed with them. With several replicas a process reads the file that has no patches.",
    upstream=f"{_SOURCE}/managers/load_snapshot.py#L299",
    versions=VERSIONS,
    until="SGLang removes the file.",
)


def failures_returned(original: Callable[..., tuple[bool, str]], *args: object, **kwargs: object) -> tuple[bool, str]:
    """Return an exception as a failure."""
    try:
        return original(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  the caller raises it
        return False, f"{type(error).__name__}: {error}"


FAILURES_RETURNED = Patch(
    target="sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_tensor",
    parameters=("named_tensors", "load_format"),
    replacement=around(failures_returned),
    why="An exception while a bucket is loaded ends the scheduler process.",
    upstream=f"{_SOURCE}/model_executor/model_runner_components/weight_updater.py#L343",
    versions=VERSIONS,
    until="update_weights_from_tensor returns every failure.",
)


# Seeds


def request_seeds(batch_info: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Give a batch the seeds of its requests. Either all of them have one, or none."""
    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    if None not in seeds:
        batch_info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch_info.temperatures.device)


REQUEST_SEEDS = Patch(
    target="sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.from_schedule_batch",
    parameters=("batch",),
    replacement=_after(request_seeds),
    why="SGLang ignores a request's seed unless the whole engine runs in deterministic mode, which is slower and needs "
    "special attention kernels.",
    upstream=f"{_SOURCE}/sampling/sampling_batch_info.py#L157",
    versions=VERSIONS,
    until="seeds of requests hold without enable_deterministic_inference.",
)


def seeded_draws(
    original: Callable[..., Any], sampler: Any, probs_BV: torch.Tensor, sampling_info: Any, positions_B: torch.Tensor,
    simple: bool, *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Draw at numbers that depend only on seed and position."""
    if sampling_info.sampling_seed is None:
        return original(sampler, probs_BV, sampling_info, positions_B, simple, *args, **kwargs)
    if not simple:
        probs_BV = filtered(probs_BV, sampling_info.top_ks, sampling_info.top_ps, sampling_info.min_ps)
    return draw(probs_BV, sampling_info.sampling_seed, positions_B), None


SEEDED_DRAWS = Patch(
    target="sglang.srt.layers.sampler:Sampler._sample_from_probs",
    parameters=("probs", "sampling_info", "positions", "simple_sampling_case"),
    replacement=around(seeded_draws),
    why="The flashinfer sampling backend refuses seeds, and the PyTorch one draws differently.",
    upstream=f"{_SOURCE}/layers/sampler.py#L404",
    versions=VERSIONS,
    until="all sampling backends draw the same from a request's seed.",
)


# The same tokens as other engines, from the same settings and weights


def whole_context(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Accept prompts up to the end of the context.

    A sequence may be one token shorter than ``max_req_len``, but a prompt of that length can be scored.
    """
    scheduler.max_req_input_len = scheduler.max_req_len


WHOLE_CONTEXT = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.__init__",
    replacement=_after(whole_context),
    why="SGLang refuses prompts that leave room for fewer than five new tokens.",
    upstream="https://github.com/sgl-project/sglang/pull/1748",
    versions=VERSIONS,
    until="max_req_input_len is max_req_len.",
)


def check_model(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Raise `ValueError` if SGLang does not implement the model's configuration."""
    runner = scheduler.tp_worker.model_runner
    mismatch = model_mismatch(
        vars(scheduler.model_config.hf_text_config), runner.model.modules(), scheduler.max_req_len - 1
    )
    if mismatch:
        raise ValueError(f"SGLang's {type(runner.model).__name__} {mismatch}. Use another engine")


def model_mismatch(config: Mapping[str, Any], layers: Iterable[object], max_model_len: int) -> str | None:
    """How SGLang's model differs from its configuration, in words, or None.

    Args:
        config: The configuration of the model's text layers.
        layers: The modules of SGLang's model.
        max_model_len: The longest sequence in tokens.
    """
    window = config.get("sliding_window")
    slides = config.get("use_sliding_window", True) and "sliding_attention" in (
        config.get("layer_types") or ["sliding_attention"]
    )
    if (
        window
        and slides
        and window < max_model_len
        and all(getattr(layer, "sliding_window_size", None) in (None, -1) for layer in layers)
    ):
        return (
            f"attends to all tokens, but its configuration says the last {window}; with engine_max_model_len={window} "
            f"the two are the same"
        )
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "dynamic" in (rotary.get("rope_type"), rotary.get("type")):
        return "scales rotary positions by a fixed factor, but its configuration says dynamic scaling"
    return None


MODEL_CHECK = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.__init__",
    replacement=_after(check_model),
    why="Some of SGLang's models ignore sliding windows and dynamic rotary scaling without an error.",
    upstream=f"{_SOURCE}/models/llama.py#L233",
    versions=VERSIONS,
    until="SGLang refuses what its models do not implement.",
)


def stop_token_ids(original: Callable[..., bool], request: Any, tokens: Sequence[int]) -> bool:
    """Check stop token ids also with ``ignore_eos``."""
    sampling = request.sampling_params
    if not sampling.ignore_eos or not sampling.stop_token_ids:
        return original(request, tokens)
    ends, tokenizer = request.eos_token_ids, request.tokenizer
    sampling.ignore_eos, request.eos_token_ids, request.tokenizer = False, None, None
    try:
        return original(request, tokens)
    finally:
        sampling.ignore_eos, request.eos_token_ids, request.tokenizer = True, ends, tokenizer


STOP_TOKEN_IDS = Patch(
    target="sglang.srt.managers.schedule_batch:Req._check_token_based_finish",
    replacement=around(stop_token_ids),
    why="With ignore_eos SGLang ignores stop_token_ids too; in other engines it concerns the end-of-sequence token only.",
    upstream=f"{_SOURCE}/managers/schedule_batch.py#L1857",
    versions=VERSIONS,
    until="ignore_eos leaves stop_token_ids alone.",
)


def penalize_prompts(result: None, penalizer: Any, *args: Any, **kwargs: Any) -> None:
    """Apply the repetition penalty to the tokens of prompts too (Keskar et al., "CTRL", 2019, arXiv:1909.05858)."""
    orchestrator = penalizer.orchestrator
    for row, request in enumerate(orchestrator.reqs()):
        tokens = {*request.origin_input_ids, *request.output_ids}
        text = torch.tensor([token for token in tokens if token < orchestrator.vocab_size], dtype=torch.int64)
        penalizer.cumulated_repetition_penalties[row, text.to(orchestrator.device)] = (
            request.sampling_params.repetition_penalty
        )


PENALIZED_PROMPTS = Patch(
    target="sglang.srt.sampling.penaltylib.repetition_penalty:BatchedRepetitionPenalizer._prepare",
    replacement=_after(penalize_prompts),
    why="SGLang's repetition penalty covers generated tokens only; vLLM's and transformers' cover the prompt too.",
    upstream=f"{_SOURCE}/sampling/penaltylib/repetition_penalty.py#L32",
    versions=VERSIONS,
    until="the repetition penalty covers the prompt.",
)


def repetition_first(result: None, orchestrator: Any, *args: Any, **kwargs: Any) -> None:
    """Put the repetition penalty before the additive ones."""
    orchestrator.penalizers = dict(
        sorted(orchestrator.penalizers.items(), key=lambda entry: not entry[0].is_multiplicative)
    )


REPETITION_FIRST = Patch(
    target="sglang.srt.sampling.penaltylib.orchestrator:BatchedPenalizerOrchestrator.__init__",
    replacement=_after(repetition_first),
    why="SGLang applies penalties in the order of a set of classes, which differs between runs; vLLM multiplies first.",
    upstream=f"{_SOURCE}/sampling/penaltylib/orchestrator.py#L23",
    versions=VERSIONS,
    until="the order is fixed, with the repetition penalty first.",
)


def accumulated_repetition_first(original: Callable[..., Any], info: Any, logits_BV: torch.Tensor) -> Any:
    """Apply the accumulated repetition penalty before the additive ones."""
    scaling_BV = info.acc_scaling_penalties
    if scaling_BV is None:
        return original(info, logits_BV)
    logits_BV.copy_(torch.where(logits_BV < 0, logits_BV * scaling_BV, logits_BV / scaling_BV))
    info.acc_scaling_penalties = None
    try:
        return original(info, logits_BV)
    finally:
        info.acc_scaling_penalties = scaling_BV


ACCUMULATED_REPETITION_FIRST = Patch(
    target="sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo._apply_pre_grammar_logits_transforms",
    parameters=("logits",),
    replacement=around(accumulated_repetition_first),
    why="With overlapped scheduling SGLang adds penalties before it multiplies; vLLM multiplies first.",
    upstream=f"{_SOURCE}/sampling/sampling_batch_info.py#L426",
    versions=VERSIONS,
    until="it multiplies first.",
)
NO_TOTAL_LIMIT = Patch(
    target="sglang.srt.managers.tokenizer_manager:TokenizerManager.validate_total_tokens",
    replacement=lambda _: False,
    why="SGLang refuses a request whose prompt and max_new_tokens exceed the context. In other engines the completion ends "
    "there, and SGLang's scheduler does that too.",
    upstream=f"{_SOURCE}/managers/tokenizer_manager.py#L1356",
    versions=VERSIONS,
    until="there is a setting for it.",
)


# Memory


def host_memory(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """On a CPU, free and reallocate the host's memory."""
    runner = scheduler.tp_worker.model_runner
    if torch.device(runner.device).type == "cpu":
        scheduler.weight_updater.memory_saver_adapter = HostMemory(
            lambda: runner.model.parameters(),
            lambda: cache_tensors(scheduler.token_to_kv_pool_allocator.get_kvcache()),
        )


HOST_MEMORY = Patch(
    target="sglang.srt.managers.scheduler:Scheduler.__init__",
    replacement=_after(host_memory),
    why="On a CPU release_memory_occupation reports success and frees nothing.",
    upstream=f"{_SOURCE}/utils/torch_memory_saver_adapter.py#L139",
    versions=VERSIONS,
    until="SGLang's memory saver works on CPUs.",
)
IN_SCHEDULER = (
    FAILURES_RETURNED, REQUEST_SEEDS, SEEDED_DRAWS, HOST_MEMORY, WHOLE_CONTEXT, MODEL_CHECK, STOP_TOKEN_IDS,
    PENALIZED_PROMPTS, REPETITION_FIRST, ACCUMULATED_REPETITION_FIRST,
)  # fmt: skip
"""Patches of the processes that SGLang starts for the model."""
PATCHES = (*IN_SCHEDULER, LOAD_FILE, NO_TOTAL_LIMIT)


def apply_in_scheduler(replicas: int) -> None:
    """Apply the patches of a scheduler process, one of ``replicas`` data-parallel ones. They last as long as it does."""
    for patch in IN_SCHEDULER:
        patch.apply()
    apply_load_file(replicas)


def apply_load_file(replicas: int) -> None:
    """Apply `LOAD_FILE` if there is only one of the data-parallel ``replicas``."""
    if replicas == 1:
        LOAD_FILE.apply()


# What the adapter and the patches use


def _used(module: str, *names: str, parameters: tuple[str, ...] = ()) -> list[Target]:
    return [Target(target=f"sglang.srt.{module}:{name}", parameters=parameters) for name in names]


USED = (
    *_used(
        "entrypoints.engine", "Engine.generate",
        parameters=(
            "prompt", "input_ids", "sampling_params", "image_data", "video_data", "return_logprob", "logprob_start_len",
        ),
    ),
    *_used(
        "entrypoints.engine", "Engine.release_memory_occupation", "Engine.resume_memory_occupation", parameters=("tags",)
    ),
    *_used(
        "entrypoints.engine", "Engine.begin_weight_update", "Engine.end_weight_update", "Engine.shutdown",
        "Engine._launch_scheduler_processes", "Engine.run_scheduler_process_func", "Engine._scheduler_init_result",
    ),
    *_used("managers.tokenizer_manager", "TokenizerManager.flush_cache", parameters=("timeout_s",)),
    *_used("managers.tokenizer_manager", "TokenizerManager.update_weights_from_tensor", parameters=("obj",)),
    *_used(
        "managers.io_struct", "UpdateWeightsFromTensorReqInput.__init__",
        parameters=("serialized_named_tensors", "load_format", "flush_cache", "weight_version"),
    ),
    *_used(
        "server_args", "ServerArgs.__init__",
        parameters=(
            "custom_weight_loader", "enable_memory_saver", "enable_weights_cpu_backup", "skip_tokenizer_init",
        ),
    ),
    *_used(
        "sampling.sampling_params", "SamplingParams.__init__",
        parameters=(
            "max_new_tokens", "min_new_tokens", "sampling_seed", "stop_token_ids", "no_stop_trim", "ignore_eos",
            "repetition_penalty",
        ),
    ),
    *_used("sampling.sampling_params", "SamplingParams.ignore_eos"),
    *_used(
        "managers.scheduler", "run_scheduler_process", "Scheduler.max_req_len", "Scheduler.max_req_input_len",
        "Scheduler.weight_updater", "Scheduler.token_to_kv_pool_allocator", "Scheduler.tp_worker", "Scheduler.model_config",
    ),
    *_used(
        "managers.scheduler_components.weight_updater", "SchedulerWeightUpdaterManager.memory_saver_adapter"
    ),
    *_used("managers.schedule_batch", "Req.eos_token_ids", "Req.tokenizer", "Req.origin_input_ids", "Req.output_ids"),
    *_used("managers.mm_schedule", "embedding_cache"),
    *_used(
        "sampling.sampling_batch_info", "SamplingBatchInfo.sampling_seed", "SamplingBatchInfo.acc_scaling_penalties"
    ),
    *_used(
        "sampling.penaltylib.repetition_penalty", "BatchedRepetitionPenalizer.cumulated_repetition_penalties",
        "BatchedRepetitionPenalizer.is_multiplicative",
    ),
    *_used("sampling.penaltylib.orchestrator", "BatchedPenalizerOrchestrator.penalizers"),
    *_used("layers.radix_attention", "RadixAttention.sliding_window_size"),
    *_used(
        "multimodal.processors.base_processor", "MultimodalSpecialTokens.image_token_regex",
        "MultimodalSpecialTokens.video_token_regex",
    ),
    *_used(
        "mem_cache.memory_pool", "MHATokenToKVPool.k_buffer", "MHATokenToKVPool.v_buffer", "MLATokenToKVPool.kv_buffer"
    ),
)  # fmt: skip
TARGETS = (*PATCHES, *USED)
"""All that must exist."""
