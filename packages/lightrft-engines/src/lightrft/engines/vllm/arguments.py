"""From settings to vLLM's own arguments.

Beside the settings of the engine, these extra arguments are read, all optional: ``engine_kv_cache_bytes``,
``engine_max_model_len``, ``engine_max_sequences``, ``engine_eager``, ``limit_mm_image_per_prompt``,
``limit_mm_video_per_prompt``, ``trust_remote_code``.
"""

import os
from typing import Any

from lightrft.config import ConfigError, StrategyConfig
from lightrft.engines.source import ModelSource

KV_CACHE_BYTES_ON_CPU = 2**30
"""Unless ``engine_kv_cache_bytes`` says otherwise: host memory is not the engine's alone."""


def llm_arguments(config: StrategyConfig, source: ModelSource, *, on_cpu: bool, seed: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``. Raises `ConfigError` for what vLLM cannot do on a CPU."""
    if on_cpu and config.enable_engine_sleep:
        raise ConfigError(
            "enable_engine_sleep=True: vLLM cannot sleep on a CPU, where it would only say that it does; use "
            "enable_engine_sleep=False, or another engine"
        )
    extra = config.get_extra_arg
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
        "enforce_eager": bool(extra("engine_eager", on_cpu)),
        "seed": seed,
        "trust_remote_code": bool(extra("trust_remote_code", False)),
        "generation_config": "vllm",
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": True,
        **_limits(config, on_cpu=on_cpu),
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


def _limits(config: StrategyConfig, *, on_cpu: bool) -> dict[str, Any]:
    named = {
        "kv_cache_memory_bytes": config.get_extra_arg(
            "engine_kv_cache_bytes", KV_CACHE_BYTES_ON_CPU if on_cpu else None
        ),
        "max_model_len": config.get_extra_arg("engine_max_model_len", None),
        "max_num_seqs": config.get_extra_arg("engine_max_sequences", None),
    }
    media = {kind: config.get_extra_arg(f"limit_mm_{kind}_per_prompt", None) for kind in ("image", "video")}
    found = {name: int(value) for name, value in named.items() if value is not None}
    limits = {kind: int(value) for kind, value in media.items() if value is not None}
    return {**found, "limit_mm_per_prompt": limits} if limits else found
