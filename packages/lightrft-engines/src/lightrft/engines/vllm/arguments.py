"""Translates settings into vLLM's arguments."""

import os
from typing import Any

from lightrft.config import ConfigError, StrategyConfig
from lightrft.engines.model_source import ModelSource
from lightrft.engines.settings import EngineSettings

KV_CACHE_BYTES_ON_CPU = 2**30
"""Default of ``engine_kv_cache_bytes`` on a CPU: the engine shares the host's memory."""


def llm_arguments(config: StrategyConfig, source: ModelSource, *, on_cpu: bool, seed: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``.

    Args:
        config: The strategy's settings.
        source: The model.
        on_cpu: Whether the engine runs on a CPU.
        seed: Seeds the engine.

    Raises:
        ConfigError: vLLM does not support a setting, or not on this device.
    """
    settings = EngineSettings.of(config)
    if on_cpu and config.enable_engine_sleep:
        raise ConfigError(
            "enable_engine_sleep: expected False for vLLM on a CPU, got True. There vLLM cannot free memory; use "
            "enable_engine_sleep=False or another engine"
        )
    if settings.verifies and config.engine_tp_size > 1:
        raise ConfigError(
            f"weight_sync_verify='checksum': expected engine_tp_size=1, because it reads the full model back from vLLM, got "
            f"engine_tp_size={config.engine_tp_size}"
        )
    return {
        "model": source.path,
        "skip_tokenizer_init": not source.has_tokenizer,
        # Also if a sync will replace the weights: "dummy" fills buffers, which no sync delivers, with random values.
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
    """Environment variables for vLLM in this process, as rank ``rank`` of ``size``."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "RANK": str(rank),
        "LOCAL_RANK": str(device_index),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # the process group exists already
    }


def _limits(settings: EngineSettings, *, on_cpu: bool) -> dict[str, Any]:
    limits = {
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (KV_CACHE_BYTES_ON_CPU if on_cpu else None),
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_sequences,
        "limit_mm_per_prompt": dict(settings.media_limits) or None,
    }
    return {name: value for name, value in limits.items() if value is not None}
