"""What of SGLang the adapter uses, and the versions that were tested with it."""

from typing import Any

from lightrft.engines.probe import Call, Library

SGLANG = Library(engine="sglang", distributions=("sglang",), supported="0.5.21 to 0.5.23")


def load() -> Any:
    """Import SGLang's engine class. Raises `BackendNotInstalledError` without all of it, `EngineError` where it lacks a
    call.
    """
    SGLANG.require(())
    with SGLANG.importing():
        from sglang.srt.entrypoints.engine import Engine

        calls = _calls(Engine)
    SGLANG.require(calls)
    return Engine


def _calls(engine: Any) -> list[Call]:
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator
    from sglang.srt.sampling.penaltylib.repetition_penalty import BatchedRepetitionPenalizer
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import ServerArgs

    return [
        Call(engine, "generate", ("prompt", "input_ids", "sampling_params", "image_data", "video_data", "return_logprob", "logprob_start_len")),
        Call(engine, "begin_weight_update"),
        Call(engine, "end_weight_update"),
        Call(TokenizerManager, "flush_cache", ("timeout_s",)),
        Call(engine, "release_memory_occupation", ("tags",)),
        Call(engine, "resume_memory_occupation", ("tags",)),
        Call(engine, "shutdown"),
        Call(engine, "_launch_scheduler_processes"),
        Call(engine, "run_scheduler_process_func"),
        Call(TokenizerManager, "update_weights_from_tensor", ("obj",)),
        Call(UpdateWeightsFromTensorReqInput, "__init__", ("serialized_named_tensors", "load_format", "flush_cache", "weight_version")),
        Call(ServerArgs, "__init__", ("custom_weight_loader", "enable_memory_saver", "enable_weights_cpu_backup", "skip_tokenizer_init")),
        Call(SamplingParams, "__init__", ("max_new_tokens", "min_new_tokens", "sampling_seed", "stop_token_ids", "no_stop_trim")),
        Call(Sampler, "_sample_from_probs", ("probs", "sampling_info", "positions", "simple_sampling_case")),
        Call(SamplingBatchInfo, "from_schedule_batch", ("batch",)),
        Call(WeightUpdater, "update_weights_from_tensor", ("named_tensors", "load_format")),
        Call(Scheduler, "__init__"),
        Call(Req, "_check_token_based_finish"),
        Call(BatchedRepetitionPenalizer, "_prepare"),
        Call(BatchedPenalizerOrchestrator, "__init__"),
        Call(SamplingBatchInfo, "_apply_pre_grammar_logits_transforms", ("logits",)),
        Call(HookRegistry, "register", ("target", "hook", "hook_type")),
    ]  # fmt: skip
