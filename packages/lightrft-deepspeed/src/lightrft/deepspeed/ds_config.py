"""From the settings to DeepSpeed's configuration: pure functions.

What DeepSpeed would count and scale by itself it is told to leave alone: micro-batches, the loss, the
schedule are the strategy's. What it does is shard, reduce, clip, step, and keep master weights.
"""

from collections.abc import Mapping
from typing import Any

from lightrft.config import StrategyConfig

REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default."""


def computes_in_bf16(config: StrategyConfig) -> bool:
    """Whether DeepSpeed stores what it trains in bfloat16, beside fp32 master weights.

    Not at stage 0: there it would accumulate gradients in bfloat16 as well ("unsupported mix" otherwise), and
    shards nothing that the copy could save. Stage 0 trains fp32 parameters under autocast.
    """
    return config.bf16 and config.zero_stage > 0


def train_config(config: StrategyConfig, *, pin_memory: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for a model in training."""
    accumulate = (config.grad_accum_dtype or "fp32") if computes_in_bf16(config) else "fp32"
    return {
        **_unmanaged(),
        "gradient_clipping": config.max_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # immediate_grad_update: otherwise BF16_Optimizer (stage 1) clears the gradients at the output of each
        # forward that a backward meets, and two forwards under one loss lose the gradient of one of them.
        "bf16": {"enabled": computes_in_bf16(config), "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": accumulate},
        # By default gradients travel in the parameters' type, whatever they are accumulated in.
        "communication_data_type": accumulate,
        "zero_optimization": _zero_of_training(config, pin_memory),
    }


def fit_bucket(settings: Mapping[str, Any], elements: int) -> dict[str, Any]:
    """``settings`` for a model of so many elements: no larger a bucket to reduce than it fills.

    DeepSpeed allocates the bucket (half a billion elements by default) whatever the model.
    """
    zero = dict(settings["zero_optimization"])
    zero["reduce_bucket_size"] = min(int(zero.get("reduce_bucket_size", REDUCE_BUCKET_ELEMENTS)), max(elements, 1))
    return {**settings, "zero_optimization": zero}


def eval_config(config: StrategyConfig, *, offload: bool = False, pin_memory: bool = False) -> dict[str, Any]:
    """DeepSpeed's configuration for a model that does not train: sharded at stage 3, in the type it came in.

    ``offload``: keep the shards in host memory.
    """
    zero: dict[str, Any] = {"stage": 3 if config.zero_stage == 3 else 0}
    if config.zero_stage == 3:
        zero["offload_param"] = {"device": "cpu" if offload else "none", "pin_memory": pin_memory}
    return {**_unmanaged(), "bf16": {"enabled": False}, "zero_optimization": zero}


def _unmanaged() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
    }


def _zero_of_training(config: StrategyConfig, pin_memory: bool) -> dict[str, Any]:
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
