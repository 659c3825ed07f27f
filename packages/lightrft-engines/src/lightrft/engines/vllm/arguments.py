"""From settings to vLLM's own arguments."""

import os
from typing import Any

from lightrft.config import ConfigError, StrategyConfig
from lightrft.engines.settings import EngineSettings
from lightrft.engines.source import ModelSource

KV_CACHE_BYTES_ON_CPU = 2**30
"""Unless ``engine_kv_cache_bytes`` says otherwise: host memory is not the engine's alone."""


def llm_arguments(config: StrategyConfig, source: ModelSource, *, on_cpu: bool, seed: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``. Raises `ConfigError` for what vLLM cannot do, here or at all."""
    settings = EngineSettings.of(config)
    if on_cpu and config.enable_engine_sleep:
        raise ConfigError(
            "enable_engine_sleep=True: vLLM cannot sleep on a CPU, where it would only say that it does; use "
            "enable_engine_sleep=False, or another engine"
        )
    if settings.verifies and config.engine_tp_size > 1:
        raise ConfigError("weight_sync_verify='checksum' reads a whole model back from vLLM; it needs engine_tp_size=1")
    return {
        "model": source.path,
        "skip_tokenizer_init": not source.has_tokenizer,
        # Also where an actor's weights will come: "dummy" fills buffers, which no sync delivers, with random numbers.
        "load_format": "auto" if source.stores_weights else "dummy",
        "dtype": "bfloat16" if config.bf16 else "float32",
        "tensor_parallel_size": config.engine_tp_size,
        "distributed_executor_backend": "external_launcher",
        "gpu_memory_utilization": config.engine_mem_util,
        "enable_sleep_mode": config.enable_engine_sleep,
        "enforce_eager": on_cpu if settings.eager is None else settings.eager,
        "seed": seed,
        "trust_remote_code": settings.trust_remote_code,
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        **_limits(settings, on_cpu=on_cpu),
        **settings.arguments,
    }


def variables(rank: int, size: int, device_index: int) -> dict[str, str]:
    """Environment variables under which vLLM runs in this process, as one of ``size`` ranks."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "RANK": str(rank),
        "LOCAL_RANK": str(device_index),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # the process group is there already
    }


def _limits(settings: EngineSettings, *, on_cpu: bool) -> dict[str, Any]:
    named = {
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (KV_CACHE_BYTES_ON_CPU if on_cpu else None),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_sequences,
        "limit_mm_per_prompt": dict(settings.media_limits) or None,
    }
    return {name: value for name, value in named.items() if value is not None}
