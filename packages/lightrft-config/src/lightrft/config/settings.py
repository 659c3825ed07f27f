"""All settings: name, type, range, default, description and owner.

Validation, the command line, the JSON schema, ``docs/settings.md`` and the check that a strategy supports what it is
given are derived from this table. Names and defaults are LightRFT's.
"""

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Owner = Literal["strategy", "engine", "trainer"]
"""The component that reads a setting."""
T = TypeVar("T")


def setting(owner: Owner, default: T, *, backend: str | None = None, **constraints: Any) -> T:
    """Define a setting.

    Args:
        owner: The component that reads it.
        default: Its default.
        backend: The only strategy that has it. Other strategies ignore it.
        constraints: Bounds, as for `pydantic.Field`.

    Returns:
        The field.
    """
    extra: dict[str, Any] = {"owner": owner} if backend is None else {"owner": owner, "backend": backend}
    return cast(T, Field(default=default, json_schema_extra=extra, **constraints))


def _list_to_tuple(value: object) -> object:
    """JSON and YAML have no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _exact_number(value: object) -> object:
    """Reject what pydantic would convert to a float and change: large integers, and any object with ``__float__``."""
    if not isinstance(value, (int, float)):
        raise ValueError("Use a Python float or int")
    try:
        exact = isinstance(value, float) or float(value) == value
    except OverflowError:
        exact = False
    if not exact:
        raise ValueError(
            "A float cannot represent this integer exactly. Write it with a decimal point to accept rounding"
        )
    return value


def _int64(value: object) -> object:
    """Reject integers that files and tensors cannot hold, and that Python does not print."""
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError("Use an integer below 2**63")
    return value


Integer = Annotated[int, BeforeValidator(_int64)]
Number = Annotated[float, BeforeValidator(_exact_number)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_exact_number)]
Beta = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_exact_number)]
GradientDtype = Literal["fp32", "bf16"]


class Settings(BaseModel):
    """The settings of a run. `StrategyConfig` adds the ways to read and write them."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )  # defer_build: `StrategyConfig` builds its own validator

    # Strategy and device
    strategy: str = setting("strategy", "auto", min_length=1)
    """Registered name of the strategy. "auto" selects "fsdp" if ``fsdp`` is set, else "deepspeed"."""
    fsdp: bool = setting("strategy", False)
    """With ``strategy="auto"``, use FSDP2 instead of DeepSpeed."""
    device: Literal["auto", "cpu", "cuda"] = setting("strategy", "auto")
    """Device of the models. "auto" selects CUDA if it is available."""
    local_rank: Integer = setting("strategy", -1, ge=-1)
    """Index of this process's device on its host. -1 reads LOCAL_RANK from the environment."""
    timeout: Number = setting("strategy", 3600.0, gt=0)
    """Timeout of a collective operation, in seconds."""

    # Training
    seed: Integer = setting("strategy", 42, ge=0, lt=2**32)
    """Seed of the random number generators of Python, NumPy and torch, and of the data order."""
    micro_train_batch_size: Integer = setting("strategy", 1, gt=0)
    """Sequences per forward and backward pass on one rank, or on the ``sp_size`` ranks that share them."""
    train_batch_size: Integer = setting("strategy", 128, gt=0)
    """Sequences per update, over all ranks and micro-batches."""
    max_norm: NonNegative | None = setting("strategy", 1.0)
    """Maximum global 2-norm of the gradients; larger gradients are scaled down. None or 0 disables clipping."""
    max_skipped_updates: Integer = setting("strategy", 10, ge=0)
    """Consecutive updates skipped for non-finite gradients after which training stops. 0 never stops."""
    bf16: bool = setting("strategy", True)
    """Compute in bfloat16 with fp32 master weights. False computes in fp32."""
    grad_accum_dtype: GradientDtype | None = setting("strategy", None)
    """Data type in which gradients are reduced and accumulated. None means fp32."""
    adam_offload: bool = setting("strategy", False)
    """Keep optimizer state in host memory between updates. DeepSpeed also runs the optimizer there."""
    fused_linear_logprob: bool = setting("strategy", False)
    """Compute the log-probabilities and entropies of ``token_log_probs`` chunk by chunk from hidden states, without the
    logits of the batch. The numbers are the same; the LM head must be a plain linear layer."""
    sp_size: Integer = setting("strategy", 1, gt=0)
    """Consecutive ranks that share each sequence (Ulysses sequence parallelism). Must divide the number of ranks."""
    async_ckpt: bool = setting("strategy", False)
    """Write checkpoints in the background while training continues."""
    ckpt_checksum: Literal["crc32", "sha256"] = setting("strategy", "crc32")
    """Checksum of checkpoint files. crc32 detects damage; sha256 is slower and also detects deliberate changes."""

    # Metrics, written by `log`
    log_dir: str | None = setting("strategy", None, min_length=1)
    """Directory of the trackers' files. If set, ``log`` also appends to ``metrics.jsonl`` in it."""
    trackers: Annotated[tuple[str, ...], BeforeValidator(_list_to_tuple)] = setting("strategy", ())
    """Names of the trackers that ``log`` writes to: "tensorboard", "wandb", "trackio", or one of your own."""
    log_project: str = setting("strategy", "lightrft", min_length=1)
    """Project of the run, for trackers that have projects."""
    log_name: str | None = setting("strategy", None, min_length=1)
    """Name of the run in its project. None lets the tracker choose one."""

    # Optimizers made by prepare_models_and_optimizers
    actor_learning_rate: Number = setting("strategy", 1e-5, ge=0)
    """Peak learning rate of the actor."""
    critic_learning_rate: Number = setting("strategy", 1e-5, ge=0)
    """Peak learning rate of the critic."""
    adam_betas: Annotated[tuple[Beta, Beta], BeforeValidator(_list_to_tuple)] = setting("strategy", (0.9, 0.95))
    """Decay rates of Adam's first and second moments."""
    l2: Number = setting("strategy", 0.0, ge=0)
    """Weight decay, applied to all parameters except biases and norms."""
    lr_warmup_ratio: Number = setting("strategy", 0.03, ge=0, le=1)
    """Fraction of the updates during which the learning rate rises linearly from 0."""
    critic_pretrain: bool | str | None = setting("strategy", False)
    """Train the critic: give it an optimizer and a learning-rate schedule. LightRFT's scripts pass the path of its
    checkpoint, which means True; None and "" mean False."""
    remote_rm_url: Annotated[str | tuple[str, ...] | None, BeforeValidator(_list_to_tuple)] = setting("strategy", None)
    """URL or URLs of remote reward models. If set, local reward models are not prepared."""

    # DeepSpeed
    zero_stage: Integer = setting("strategy", 2, backend="deepspeed", ge=0, le=3)
    """ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 also the gradients, 3 also the parameters."""
    zpg: Integer = setting("strategy", 1, backend="deepspeed", gt=0)
    """Ranks per secondary ZeRO-3 partition (ZeRO++ hpZ), which keeps all-gathers inside a host. 1 disables it."""
    overlap_comm: bool = setting("strategy", False, backend="deepspeed")
    """Overlap gradient reduction with the backward pass (ZeRO 2 and 3)."""

    # FSDP2
    fsdp_shard_size: Integer = setting("strategy", -1, backend="fsdp", ge=-1)
    """Ranks over which parameters are sharded; groups of ranks are replicas (HSDP). -1 shards over all ranks."""
    fsdp_cpu_offload: bool = setting("strategy", False, backend="fsdp")
    """Keep the shards in host memory and run the optimizer there."""
    mixed_mm_data: bool = setting("strategy", False, backend="fsdp")
    """Batches mix text and images: keep vision layers in the root module, so that a rank may skip them."""
    use_mp_opt: bool = setting("strategy", False, backend="fsdp")
    """LightRFT's optimizer with fp32 master weights for bf16 parameters. Not supported: FSDP2 always keeps fp32 master
    weights here."""

    # Rollout engine
    engine_type: str = setting("engine", "vllm", min_length=1)
    """Registered name of the rollout engine."""
    engine_tp_size: Integer = setting("engine", 1, gt=0)
    """Ranks that share one engine (tensor parallelism)."""
    engine_mem_util: Number = setting("engine", 0.6, gt=0, le=1)
    """Fraction of the device memory that the engine may use."""
    enable_engine_sleep: bool = setting("engine", False)
    """Put the engine to sleep between rollouts, which releases its memory."""
    weight_sync_bucket_bytes: Integer = setting("engine", 256 * 2**20, gt=0)
    """Bucket size of weight sync and of `save_model`: bytes of full parameters gathered at a time."""

    # Trainer: the strategy only stores them, for LightRFT's trainers and for yours; `get_strategy` warns of them once
    pretrain_data: str | None = setting("trainer", None)
    """Path of a pre-training data set to mix in. Read by LightRFT's trainer."""
    reward_running_norm: bool = setting("trainer", False)
    """Divide rewards by their running standard deviation. Read by LightRFT's trainer."""
    reward_running_norm_minus_mean: bool = setting("trainer", False)
    """With ``reward_running_norm``, also subtract the running mean. Read by LightRFT's trainer."""
    advantages_norm: bool = setting("trainer", False)
    """Normalise advantages over the batch. Read by LightRFT's trainer."""
    advantage_clip: Number = setting("trainer", 0.0, ge=0)
    """Maximum magnitude of an advantage. 0 means no limit. Read by LightRFT's trainer."""
    reward_clip: Number = setting("trainer", 0.0, ge=0)
    """Maximum magnitude of a reward. 0 means no limit. Read by LightRFT's trainer."""
    micro_rollout_batch_size: Integer = setting("trainer", 2, gt=0)
    """Sequences per forward pass when experience is made. Read by LightRFT's trainer."""
    n_samples_per_prompt: Integer = setting("trainer", 8, gt=0)
    """Completions per prompt. Read by LightRFT's trainer."""
    overlong_buffer: bool = setting("trainer", False)
    """Penalise completions that approach the length limit. Read by LightRFT's trainer."""
    overlong_buffer_len: Integer = setting("trainer", 1024, gt=0)
    """Tokens before the length limit over which the penalty increases. Read by LightRFT's trainer."""
    overlong_buffer_penalty_factor: Number = setting("trainer", 1.0, ge=0)
    """Penalty at the length limit, in units of reward. Read by LightRFT's trainer."""
    dynamic_sampling: bool = setting("trainer", False)
    """Resample prompts whose completions all received the same reward. Read by LightRFT's trainer."""
    advantage_estimator: str = setting("trainer", "group_norm", min_length=1)
    """Advantage estimator. Read by LightRFT's trainer."""
    use_kl_loss: bool = setting("trainer", False)
    """Add the KL divergence from the reference model to the loss instead of the reward. Read by LightRFT's trainer."""
    kl_estimator: Literal["k1", "k2", "k3"] = setting("trainer", "k3")
    """Estimator of the KL divergence (J. Schulman, "Approximating KL divergence", 2020). Read by LightRFT's trainer."""
    plot_every: Integer = setting("trainer", -1, ge=-1)
    """Steps between plots of completion lengths. -1 disables them. Read by LightRFT's trainer."""
    use_tensorboard: bool | str | None = setting("trainer", False)
    """Log to TensorBoard: True, or the directory to write to. ``strategy.log`` does not use it; see ``trackers``.
    Read by LightRFT's trainer."""

    extra_args: dict[str, Any] = Field(default={}, json_schema_extra={"owner": "trainer"})
    """Values that `StrategyConfig.from_args` found and that are not settings, by name."""
