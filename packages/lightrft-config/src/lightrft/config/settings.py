"""Every setting: its name, type, range, default, meaning, and whose it is.

This file is the table that the rest is derived from: validation, the command line, the JSON schema, the
summary, and the check that a chosen strategy honours what it is given. Names and defaults are LightRFT's.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Owner = Literal["strategy", "engine", "trainer"]
"""Who reads a setting: the strategy, the rollout engine, or the trainer for itself."""


def of(owner: Owner, default: Any, *, backend: str | None = None, **constraints: Any) -> Any:
    """A setting of ``owner``; ``backend`` names the one strategy that has it, others are exempt."""
    extra: dict[str, Any] = {"owner": owner} if backend is None else {"owner": owner, "backend": backend}
    return Field(default=default, json_schema_extra=extra, **constraints)


def _list_to_tuple(value: object) -> object:
    """JSON and YAML have no tuples."""
    return tuple(value) if isinstance(value, list) else value


Beta = Annotated[float, Field(ge=0, lt=1)]
GradientDtype = Literal["fp32", "bf16"]


class Settings(BaseModel):
    """The settings of a strategy, without the ways to read and write them (see `StrategyConfig`)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    # Which strategy, where
    strategy: str = of("strategy", "auto", min_length=1)
    """Registered name of the strategy; "auto" means "fsdp" where ``fsdp`` is set, else "deepspeed"."""
    fsdp: bool = of("strategy", False)
    """With ``strategy="auto"``, choose FSDP2 rather than DeepSpeed."""
    device: Literal["auto", "cpu", "cuda"] = of("strategy", "auto")
    """Where models live; "auto" means CUDA where there is any."""
    local_rank: int = of("strategy", -1, ge=-1)
    """Index of this process's device on its host; -1 reads LOCAL_RANK from the environment."""
    timeout: float = of("strategy", 3600.0, gt=0)
    """Seconds that any collective may wait for another rank."""

    # Training
    seed: int = of("strategy", 42, ge=0, lt=2**32)
    """Seed of Python's, NumPy's and torch's random streams, and of the order of the data."""
    micro_train_batch_size: int = of("strategy", 1, gt=0)
    """Sequences of one forward and backward on one rank."""
    train_batch_size: int = of("strategy", 128, gt=0)
    """Sequences of one update, over all ranks and micro-batches."""
    max_norm: float | None = of("strategy", 1.0, ge=0)
    """Largest global 2-norm of a gradient before it is scaled down; None or 0 means no clipping."""
    max_skipped_updates: int = of("strategy", 10, ge=0)
    """Consecutive updates skipped for non-finite gradients after which training stops; 0 means never."""
    bf16: bool = of("strategy", True)
    """Compute in bfloat16, with fp32 master weights; False computes in fp32."""
    grad_accum_dtype: GradientDtype | None = of("strategy", None)
    """Type in which gradients are reduced and accumulated; None means fp32."""
    adam_offload: bool = of("strategy", False)
    """Keep optimizer state in host memory between updates; DeepSpeed runs the optimizer there too."""
    sp_size: int = of("strategy", 1, gt=0)
    """Ranks that share one sequence (sequence parallelism)."""
    async_ckpt: bool = of("strategy", False)
    """Write checkpoints in the background while training goes on."""
    ckpt_checksum: Literal["crc32", "sha256"] = of("strategy", "crc32")
    """How damage to checkpoints is found; sha256 takes longer, and also tells what was changed on purpose."""

    # The optimizers that prepare_models_and_optimizers makes
    actor_learning_rate: float = of("strategy", 1e-5, ge=0)
    """Peak learning rate of the actor."""
    critic_learning_rate: float = of("strategy", 1e-5, ge=0)
    """Peak learning rate of the critic."""
    adam_betas: Annotated[tuple[Beta, Beta], BeforeValidator(_list_to_tuple)] = of("strategy", (0.9, 0.95))
    """Decay rates of Adam's two moments."""
    l2: float = of("strategy", 0.0, ge=0)
    """Weight decay, of everything but biases and norms."""
    lr_warmup_ratio: float = of("strategy", 0.03, ge=0, le=1)
    """Part of the updates over which the learning rate rises from 0."""
    critic_pretrain: bool = of("strategy", False)
    """Whether the critic is trained, and so gets an optimizer and a schedule."""
    remote_rm_url: Annotated[str | tuple[str, ...] | None, BeforeValidator(_list_to_tuple)] = of("strategy", None)
    """Where reward models are served; where set, local reward models are not prepared."""

    # DeepSpeed's
    zero_stage: int = of("strategy", 2, backend="deepspeed", ge=0, le=3)
    """What ZeRO shards: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    zpg: int = of("strategy", 1, backend="deepspeed", gt=0)
    """Ranks in a secondary ZeRO-3 partition (ZeRO++ hpZ), to keep its gathers inside a host; 1 is off."""
    overlap_comm: bool = of("strategy", False, backend="deepspeed")
    """Reduce gradients while backward goes on (ZeRO 2 and 3)."""

    # FSDP2's
    fsdp_shard_size: int = of("strategy", -1, backend="fsdp", ge=-1)
    """Ranks over which parameters are sharded; the rest are replicas (HSDP). -1 shards over all."""
    fsdp_cpu_offload: bool = of("strategy", False, backend="fsdp")
    """Keep the shards, and run the optimizer, in host memory."""
    mixed_mm_data: bool = of("strategy", False, backend="fsdp")
    """Batches mix text with images: keep vision layers in the root, so that ranks may skip them."""
    use_mp_opt: bool = of("strategy", False, backend="fsdp")
    """LightRFT's optimizer that keeps fp32 master weights beside bf16 parameters. FSDP2 has fp32 masters here anyway:
    asking for this is refused."""

    # The rollout engine's
    engine_type: str = of("engine", "vllm", min_length=1)
    """Registered name of the rollout engine."""
    engine_tp_size: int = of("engine", 1, gt=0)
    """Ranks that share one engine (tensor parallelism)."""
    engine_mem_util: float = of("engine", 0.6, gt=0, le=1)
    """Part of the device's memory that the engine may take."""
    enable_engine_sleep: bool = of("engine", False)
    """Put the engine to sleep, giving its memory back, between rollouts."""
    weight_sync_bucket_bytes: int = of("engine", 256 * 2**20, gt=0)
    """Bytes of whole parameters that are gathered and sent to the engine at a time."""

    # The trainer's: a strategy carries these and does not read them
    pretrain_data: str | None = of("trainer", None)
    """Path of a pre-training data set that is mixed in."""
    fused_linear_logprob: bool = of("trainer", False)
    """Compute log-probabilities from hidden states without materialising the logits."""
    reward_running_norm: bool = of("trainer", False)
    """Divide rewards by their running standard deviation."""
    reward_running_norm_minus_mean: bool = of("trainer", False)
    """With ``reward_running_norm``, subtract the running mean as well."""
    advantages_norm: bool = of("trainer", False)
    """Normalise advantages over the batch."""
    advantage_clip: float = of("trainer", 0.0, ge=0)
    """Largest magnitude of an advantage; 0 means no limit."""
    reward_clip: float = of("trainer", 0.0, ge=0)
    """Largest magnitude of a reward; 0 means no limit."""
    micro_rollout_batch_size: int = of("trainer", 2, gt=0)
    """Sequences of one forward while making experience."""
    n_samples_per_prompt: int = of("trainer", 8, gt=0)
    """Completions of each prompt."""
    overlong_buffer: bool = of("trainer", False)
    """Penalise completions that come near the length limit."""
    overlong_buffer_len: int = of("trainer", 1024, gt=0)
    """Tokens before the limit over which that penalty grows."""
    overlong_buffer_penalty_factor: float = of("trainer", 1.0, ge=0)
    """That penalty at the limit, in units of reward."""
    dynamic_sampling: bool = of("trainer", False)
    """Sample again the prompts whose completions all got the same reward."""
    advantage_estimator: str = of("trainer", "group_norm", min_length=1)
    """How advantages are estimated."""
    use_kl_loss: bool = of("trainer", False)
    """Put the divergence from the initial model in the loss rather than in the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = of("trainer", "k3")
    """Estimator of that divergence (J. Schulman, "Approximating KL divergence", 2020)."""
    plot_every: int = of("trainer", -1, ge=-1)
    """Steps between plots of completion lengths; -1 means none."""
    use_tensorboard: bool | str | None = of("trainer", False)
    """Log to TensorBoard, or the folder to log to."""

    extra_args: dict[str, Any] = Field(default={}, json_schema_extra={"owner": "trainer"})
    """What `StrategyConfig.from_args` found beside the settings, by name."""
