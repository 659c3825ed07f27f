"""Settings that are each fine and cannot be meant together.

Only what can be known from the settings alone stands here. Whether the chosen strategy can honour them is
for the strategy to say, once it is known.
"""

from collections.abc import Iterator

from lightrft.config.settings import Settings


def contradictions(settings: Settings) -> Iterator[str]:
    """One sentence for each contradiction in ``settings``, with the numbers and the remedy."""
    s = settings
    for name in s.extra_args.keys() & type(s).model_fields.keys():
        yield f"extra_args has {name!r} ({s.extra_args[name]!r}), which is a setting; give it as one"
    if s.fsdp and s.strategy not in ("auto", "fsdp"):
        yield f"fsdp=True asks for FSDP2 and strategy={s.strategy!r} for another strategy; give one of the two"
    if s.train_batch_size % s.micro_train_batch_size:
        yield (
            f"train_batch_size={s.train_batch_size} is not a multiple of "
            f"micro_train_batch_size={s.micro_train_batch_size}; an update is a whole number of micro-batches"
        )
    if s.grad_accum_dtype == "bf16" and not s.bf16:
        yield "grad_accum_dtype='bf16' accumulates what bf16=False computes in fp32; set bf16, or leave it out"
    if s.fsdp_shard_size == 0:
        yield "fsdp_shard_size=0; give a number of ranks, or -1 for all"
    if s.fsdp_cpu_offload and s.adam_offload:
        yield "fsdp_cpu_offload=True already keeps the optimizer in host memory; leave adam_offload out"
    if s.reward_running_norm_minus_mean and not s.reward_running_norm:
        yield "reward_running_norm_minus_mean=True is a part of reward_running_norm, which is False; set both"
    if s.advantage_estimator == "group_norm" and s.n_samples_per_prompt == 1:
        yield (
            "advantage_estimator='group_norm' compares the completions of a prompt and "
            "n_samples_per_prompt=1 makes only one; ask for at least 2"
        )
    if s.dynamic_sampling and s.n_samples_per_prompt == 1:
        yield (
            "dynamic_sampling=True looks for prompts whose completions differ in reward and "
            "n_samples_per_prompt=1 makes only one; ask for at least 2"
        )
