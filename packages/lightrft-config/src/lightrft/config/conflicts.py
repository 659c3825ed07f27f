"""Settings that are each valid but conflict with one another.

This module checks only what the settings alone decide. Whether the chosen strategy supports them is checked by the
strategy.
"""

from collections.abc import Iterator

from lightrft.config.settings import Settings


def conflicts(settings: Settings) -> Iterator[str]:
    """Yield one message for each conflict in ``settings``, with the values and the remedy."""
    s = settings
    for name in s.extra_args.keys() & type(s).model_fields.keys():
        yield f"extra_args: {name!r} is a setting. Pass it as {name}=..., not in extra_args"
    if s.fsdp and s.strategy not in ("auto", "fsdp"):
        yield f"fsdp=True selects FSDP2, but strategy={s.strategy!r} selects another strategy. Remove one of the two"
    if s.train_batch_size % s.micro_train_batch_size:
        yield (
            f"train_batch_size={s.train_batch_size} is not a multiple of "
            f"micro_train_batch_size={s.micro_train_batch_size}. Change one so that it is"
        )
    if s.grad_accum_dtype == "bf16" and not s.bf16:
        yield (
            "grad_accum_dtype='bf16' requires bf16=True: with bf16=False, gradients are fp32. "
            "Set bf16=True or remove grad_accum_dtype"
        )
    if s.fsdp_shard_size == 0:
        yield "fsdp_shard_size=0 is not a number of ranks. Use a positive number, or -1 for all ranks"
    if s.fsdp_cpu_offload and s.adam_offload:
        yield "fsdp_cpu_offload=True already keeps the optimizer in host memory. Remove adam_offload"
    if s.reward_running_norm_minus_mean and not s.reward_running_norm:
        yield "reward_running_norm_minus_mean=True requires reward_running_norm=True. Set both"
    if s.advantage_estimator == "group_norm" and s.n_samples_per_prompt == 1:
        yield (
            "advantage_estimator='group_norm' compares the completions of a prompt, but n_samples_per_prompt=1. "
            "Use at least 2"
        )
    if s.dynamic_sampling and s.n_samples_per_prompt == 1:
        yield (
            "dynamic_sampling=True selects prompts whose completions differ in reward, but n_samples_per_prompt=1. "
            "Use at least 2"
        )
