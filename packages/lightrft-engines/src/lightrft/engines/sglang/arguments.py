"""Translates settings into SGLang's arguments and environment. Pure."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightrft.config import StrategyConfig
from lightrft.engines.model_source import ModelSource
from lightrft.engines.settings import EngineSettings

KV_CACHE_BYTES_ON_CPU = 2**30
"""Default of ``engine_kv_cache_bytes`` on a CPU: the engine shares the host's memory."""
MAX_SEQUENCES = 256
"""Default of ``engine_max_sequences`` on a CPU; on a GPU SGLang decides."""
SPARE = 2
"""Tokens of its context that SGLang never fills. Its context length is the longest sequence plus this."""
LOADER = "lightrft.engines.sglang.scheduler.load_bucket"
"""The function that loads a bucket of weights in SGLang's scheduler processes."""
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Variables of the launcher that started the training. SGLang's processes form a separate world."""
IMPORTED_WITH = {
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",  # before temperature and filters
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # by `SPARE`
    "TOKENIZERS_PARALLELISM": "false",
}
"""Variables that SGLang and torch read when they are imported."""
IMPORTED_WITH_ON_CPU = {"TORCH_COMPILE_DISABLE": "1"}
"""Further variables on a CPU. Without them SGLang compiles its penalties, with a compiler that may be missing."""


def server_arguments(
    config: StrategyConfig, source: ModelSource, *, device: str, index: int, seed: int
) -> dict[str, Any]:
    """Arguments of ``sglang.Engine``.

    Args:
        config: The strategy's settings.
        source: The model.
        device: "cpu" or "cuda".
        index: The number of the device; with tensor parallelism, of the first one.
        seed: Seeds the engine.
    """
    on_cpu, settings = device == "cpu", EngineSettings.of(config)
    return {
        "model_path": source.path,
        "skip_tokenizer_init": not source.has_tokenizer,
        "load_format": "auto" if source.stores_weights else "dummy",
        "dtype": "bfloat16" if config.bf16 else "float32",
        "tp_size": config.engine_tp_size,
        "base_gpu_id": index,
        "mem_fraction_static": config.engine_mem_util,
        "enable_memory_saver": config.enable_engine_sleep and not on_cpu,
        "enable_weights_cpu_backup": config.enable_engine_sleep and not on_cpu,
        "disable_cuda_graph": on_cpu if settings.eager is None else settings.eager,
        "random_seed": seed,
        "trust_remote_code": settings.trust_remote_code,
        "custom_weight_loader": [LOADER],
        "schedule_policy": "lpm",  # prompts with a common prefix wait for the first of them
        "sleep_on_idle": True,  # otherwise, each scheduler process uses a full core while idle
        "host": "127.0.0.1",
        "log_level": "error",
        **(_on_cpu(source) if on_cpu else {}),
        **_limits(settings, source, item=2 if config.bf16 else 4, on_cpu=on_cpu),
        **settings.arguments,
    }


def server_variables(
    environment: Mapping[str, str], directory: str, *, on_cpu: bool, ranks: int = 1, cores: Sequence[int] = ()
) -> dict[str, str]:
    """The environment of the server process.

    Args:
        environment: The environment of this process.
        directory: For the server's temporary files.
        on_cpu: Whether the engine runs on a CPU.
        ranks: Tensor-parallel ranks. On a CPU they share ``cores``; by default, SGLang needs one NUMA node for each.
        cores: The cores of this process.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    kept.pop("SGLANG_USE_CPU_ENGINE", None)  # it needs kernels that SGLang's wheels do not have
    if on_cpu and ranks > 1:
        kept.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(_shares(cores, ranks)))
    return {**kept, **IMPORTED_WITH, **(IMPORTED_WITH_ON_CPU if on_cpu else {}), "TMPDIR": directory}


def _shares(cores: Sequence[int], ranks: int) -> list[str]:
    """The cores of each rank; all cores for each rank if there are fewer cores than ranks."""
    size = len(cores) // ranks
    parts = [cores[rank * size : (rank + 1) * size] if size else cores for rank in range(ranks)]
    return [",".join(map(str, part)) for part in parts]


def _on_cpu(source: ModelSource) -> dict[str, Any]:
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
    }


def _limits(settings: EngineSettings, source: ModelSource, *, item: int, on_cpu: bool) -> dict[str, Any]:
    size = settings.kv_cache_bytes or (KV_CACHE_BYTES_ON_CPU if on_cpu else None)
    sequences = settings.max_sequences or MAX_SEQUENCES
    limits = {
        "max_total_tokens": None if size is None else cache_tokens(model_settings(source), size, item, sequences),
        "context_length": None if source.max_model_len is None else source.max_model_len + SPARE,
        "max_running_requests": sequences if on_cpu else settings.max_sequences,
        "limit_mm_data_per_request": dict(settings.media_limits) or None,
    }
    return {name: value for name, value in limits.items() if value is not None}


def model_settings(source: ModelSource) -> Mapping[str, Any]:
    """The model's configuration, with that of its text layers at the top level."""
    file = Path(source.path) / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {**settings, **(settings.get("text_config") or {})}


def cache_tokens(settings: Mapping[str, Any], size: int, item: int, sequences: int) -> int:
    """Tokens whose keys and values fit into ``size`` bytes, at most those of ``sequences`` sequences of full length."""
    max_model_len = int(settings.get("max_position_embeddings") or size)
    return min(size // max(1, token_bytes(settings, item)), sequences * max_model_len)


def token_bytes(settings: Mapping[str, Any], item: int) -> int:
    """Bytes of one token's keys and values, with ``item`` bytes a number; 0 if the configuration does not say."""
    heads = settings.get("num_attention_heads", 0)
    width = settings.get("head_dim") or (settings.get("hidden_size", 0) // heads if heads else 0)
    key_value_heads = settings.get("num_key_value_heads") or heads
    return int(2 * item * width * key_value_heads * settings.get("num_hidden_layers", 0))
