"""DeepSpeed's configuration, from the settings: pure functions.

DeepSpeed shards, reduces, clips, steps and keeps master weights. It does not count micro-batches, scale the loss or step
the schedule: the strategy does.
"""

from collections.abc import Mapping
from typing import Any

from lightrft.config import StrategyConfig

REDUCE_BUCKET_ELEMENTS = 50_000_000
"""A tenth of DeepSpeed's default. Gradients are copied into a bucket to be reduced, and freed when it is full: for a model of
135 million parameters, an update of ZeRO-1 takes a quarter longer on CPUs with one bucket for all."""


def computes_in_bf16(config: StrategyConfig) -> bool:
    """Return whether DeepSpeed stores models in training in bfloat16, in addition to fp32 master weights.

    Not at stage 0: DeepSpeed would accumulate gradients in bfloat16 there (it refuses fp32 as an "unsupported mix"), and
    would save no memory. Stage 0 trains fp32 parameters under autocast.
    """
    return config.bf16 and config.zero_stage > 0


def train_config(config: StrategyConfig, *, pin_memory: bool = False) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a model in training.

    Args:
        config: The settings.
        pin_memory: Keep what is offloaded in pinned memory.
    """
    accumulate = (config.grad_accum_dtype or "fp32") if computes_in_bf16(config) else "fp32"
    return {
        **_unmanaged(),
        "gradient_clipping": config.max_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # immediate_grad_update: BF16_Optimizer (stage 1) would otherwise clear the gradients at the output of each
        # forward that a backward meets, and two forwards under one loss would lose the gradient of one of them.
        "bf16": {"enabled": computes_in_bf16(config), "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": accumulate},
        # The default is the parameters' dtype, regardless of the dtype in which gradients are accumulated.
        "communication_data_type": accumulate,
        "zero_optimization": _zero_optimization(config, pin_memory),
    }


def fit_bucket(settings: Mapping[str, Any], elements: int) -> dict[str, Any]:
    """Return ``settings`` with a bucket no larger than the ``elements`` of the model in training.

    DeepSpeed allocates the bucket regardless of the model's size.
    """
    zero = dict(settings["zero_optimization"])
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS)), max(elements, 1))
    return {**settings, "zero_optimization": zero}


def eval_config(config: StrategyConfig, *, offload: bool = False, pin_memory: bool = False) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a model that does not train: sharded at stage 3, in its own type.

    Args:
        config: The settings.
        offload: Keep the shards in host memory.
        pin_memory: Keep what is offloaded in pinned memory.
    """
    zero: dict[str, Any] = {"stage": 3 if config.zero_stage == 3 else 0}
    if config.zero_stage == 3:
        zero["offload_param"] = {"device": "cpu" if offload else "none", "pin_memory": pin_memory}
    return {**_unmanaged(), "bf16": {"enabled": False}, "zero_optimization": zero}


def _unmanaged() -> dict[str, Any]:
    """Return what makes DeepSpeed leave counting and scaling to the strategy."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
    }


def _zero_optimization(config: StrategyConfig, pin_memory: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "overlap_comm": config.overlap_comm,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
    }
    if config.zero_stage == 3:
        zero["zero_hpz_partition_size"] = config.zpg
    if config.adam_offload and config.zero_stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    return zero
