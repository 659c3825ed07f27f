"""Settings that are each valid but conflict with one another.

This module checks only what the settings alone decide. Whether the chosen strategy supports them is checked by the
strategy.
"""

import re
from collections.abc import Collection, Iterator, Mapping

from lightrft.config.settings import Settings


def conflicts(settings: Settings) -> Iterator[str]:
    """Yield one message for each conflict in ``settings``, with the values and the remedy."""
    s = settings
    for name in s.extra_args.keys() & type(s).model_fields.keys():
        yield f"extra_args: {name!r} is a setting. Pass it as {name}=..., not in extra_args"
    if s.fsdp and s.strategy not in ("auto", "fsdp"):
        yield f"fsdp=True selects FSDP2, but strategy={s.strategy!r} selects another strategy. Remove one of the two"
    yield from _of_trackers(s)
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


def _of_trackers(settings: Settings) -> Iterator[str]:
    for name in ("jsonl", "tensorboard"):
        if name in settings.trackers and settings.log_dir is None:
            yield f"trackers: {name!r} writes to a directory, but log_dir is None. Set log_dir, or leave {name!r} out"


def conflicts_of_others(given: Mapping[str, object], invalid: Collection[str]) -> Iterator[str]:
    """Yield the conflicts that do not involve ``invalid`` settings, so that one run shows everything that is wrong."""
    valid = {name: value for name, value in given.items() if name in Settings.model_fields and name not in invalid}
    for message in conflicts(Settings.model_construct(**valid)):  # type: ignore[arg-type]  # each value was validated
        if not set(re.findall(r"\w+", message)) & set(invalid):
            yield message
