"""What runs in the processes that SGLang starts for the model: its hooks, and the loading of a bucket.

seeds        with a seed, a draw depends on it and on the position alone; SGLang has this on some GPUs only
failures     a bucket that cannot be loaded is a failed call, not the end of the process
meanings     what SGLang means otherwise than the other engines; see meanings.py
memory       on a CPU, where SGLang would only say that it gave memory back, it does
files        what SGLang would leave in /dev/shm goes with the temporary files
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lightrft.engines.sglang import meanings, watching
from lightrft.engines.sglang.shared import checksum, from_json, views

_GOLDEN = -7046029254386353131
_MIXERS = ((30, -4658895280553007687), (27, -7723592293110705685))
"""Of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014), as signed numbers."""


def run_scheduler(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang's own entry point of a model process, with our hooks in place."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    install()
    keep_load_file(server_args.dp_size)
    run_scheduler_process(server_args, *args, **kwargs)


def install() -> None:
    """Register our hooks with SGLang, in this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    component = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    HookRegistry.register(f"{component}.update_weights_from_tensor", failures_returned, HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", with_seeds, HookType.AFTER
    )
    HookRegistry.register("sglang.srt.layers.sampler.Sampler._sample_from_probs", seeded, HookType.AROUND)
    scheduler = "sglang.srt.managers.scheduler.Scheduler.__init__"
    HookRegistry.register(scheduler, with_host_memory, HookType.AFTER)
    HookRegistry.register(scheduler, meanings.with_whole_context, HookType.AFTER)
    HookRegistry.register(scheduler, meanings.refuse_other_models, HookType.AFTER)
    request = "sglang.srt.managers.schedule_batch.Req._check_token_based_finish"
    HookRegistry.register(request, meanings.stops_at_ids, HookType.AROUND)
    sampling = "sglang.srt.sampling"
    penalizer = f"{sampling}.penaltylib.repetition_penalty.BatchedRepetitionPenalizer._prepare"
    HookRegistry.register(penalizer, meanings.with_prompts, HookType.AFTER)
    penalizers = f"{sampling}.penaltylib.orchestrator.BatchedPenalizerOrchestrator.__init__"
    HookRegistry.register(penalizers, meanings.repetition_first, HookType.AFTER)
    accumulated = f"{sampling}.sampling_batch_info.SamplingBatchInfo._apply_pre_grammar_logits_transforms"
    HookRegistry.register(accumulated, meanings.repetition_first_of_accumulated, HookType.AROUND)
    HookRegistry.apply_hooks()


# Files


def keep_load_file(replicas: int) -> None:
    """Have SGLang's processes tell each other of their load in a file among the temporary ones, which are removed.

    The file in /dev/shm is never removed by SGLang 0.5.23. Of several ``replicas`` a process reads it that has no
    hooks, so there it stays.
    """
    with contextlib.suppress(ImportError):  # of versions that have no such file
        from sglang.srt.managers import load_snapshot

        original = load_snapshot.shm_path_for
        if replicas == 1:
            load_snapshot.shm_path_for = lambda name: f"{os.environ['TMPDIR']}/{Path(original(name)).name}"


# Weights


def load_bucket(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load what `Server.load` sent, once it is sure that it is that. Drops what older weights made of pictures."""
    from sglang.srt.managers import mm_schedule

    parts = dict(named_tensors)
    plan, block = from_json(parts["plan"]), parts["bucket"]
    size = plan["size"]
    if plan["checksum"] is not None and (found := checksum(block[:size])) != plan["checksum"]:
        raise ValueError(f"a bucket arrived with checksum {found:#x}, and was sent with {plan['checksum']:#x}")
    weights = watching.watched(views(block, plan["entries"]))
    model.load_weights(weights)  # type: ignore[operator]
    homeless = [name for name in watching.left_out(weights) if not name.endswith("rotary_emb.inv_freq")]
    if homeless and plan["whole"]:
        raise ValueError(
            f"SGLang's {type(model).__name__} has no place for {len(homeless)} of the weights, {homeless[0]} first, so it "
            f"would compute something else; use another engine"
        )
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()


def failures_returned(original: Callable[..., tuple[bool, str]], *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """Turn an exception into the result that says so: SGLang would end the process."""
    try:
        return original(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  the caller raises it
        return False, f"{type(error).__name__}: {error}"


# Seeds


def with_seeds(batch_info: Any, cls: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Give a batch the seeds of its requests; all of them have one, or none has."""
    found = [request.sampling_params.sampling_seed for request in batch.reqs]
    if None not in found:
        batch_info.sampling_seed = torch.tensor(found, dtype=torch.int64, device=batch_info.temperatures.device)


def seeded(
    original: Callable[..., Any], sampler: Any, probs_BV: torch.Tensor, sampling_info: Any, positions_B: torch.Tensor, simple: bool,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Draw by inverse CDF at a number that follows from seed and position."""
    if sampling_info.sampling_seed is None:
        return original(sampler, probs_BV, sampling_info, positions_B, simple, *args, **kwargs)
    if not simple:
        probs_BV = filtered(probs_BV, sampling_info.top_ks, sampling_info.top_ps, sampling_info.min_ps)
    cumulative_BV = probs_BV.double().cumsum(dim=-1)
    marks_B1 = uniform(sampling_info.sampling_seed, positions_B)[:, None] * cumulative_BV[:, -1:]
    drawn_B1 = torch.searchsorted(cumulative_BV, marks_B1, right=True).clamp_(max=probs_BV.shape[-1] - 1)
    return drawn_B1.squeeze(1).to(torch.int32), None


def uniform(seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each seed and position: SplitMix64."""
    mixed_B = seeds_B + (positions_B.to(torch.int64) + 1) * _GOLDEN
    for shift, factor in _MIXERS:
        mixed_B = (mixed_B ^ _shifted(mixed_B, shift)) * factor
    mixed_B = mixed_B ^ _shifted(mixed_B, 31)
    return _shifted(mixed_B, 11).double() / 2**53


def _shifted(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's keeps the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def filtered(
    probs_BV: torch.Tensor, top_ks_B: torch.Tensor, top_ps_B: torch.Tensor, min_ps_B: torch.Tensor
) -> torch.Tensor:
    """Zero what top-k, top-p and min-p leave out; the rest is not renormalised."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    ranks_V = torch.arange(probs_BV.shape[-1], device=probs_BV.device)
    kept_BV = (ranks_V < top_ks_B[:, None]) & (before_BV < top_ps_B[:, None] * sorted_BV.sum(dim=-1, keepdim=True))
    kept_BV &= sorted_BV >= sorted_BV[:, :1] * min_ps_B[:, None]
    return probs_BV.where(torch.zeros_like(kept_BV).scatter(-1, order_BV, kept_BV), 0.0)


# Memory


def with_host_memory(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """On a CPU, let the scheduler release and resume memory that is the host's."""
    runner = scheduler.tp_worker.model_runner
    if torch.device(runner.device).type == "cpu":
        scheduler.weight_updater.memory_saver_adapter = HostMemory(
            lambda: runner.model.parameters(),
            lambda: _cache_tensors(scheduler.token_to_kv_pool_allocator.get_kvcache()),
        )


class HostMemory:
    """Releases tensors, content and all, and takes memory for them again."""

    def __init__(self, weights: Callable[[], Any], kv_cache: Callable[[], Any]) -> None:
        self._tensors = {"weights": weights, "kv_cache": kv_cache}
        self._sizes: dict[str, list[tuple[torch.UntypedStorage, int]]] = {}

    def pause(self, tag: str) -> None:
        """Release what ``tag`` names."""
        if tag not in self._tensors or tag in self._sizes:
            return
        storages = {it.untyped_storage()._cdata: it.untyped_storage() for it in self._tensors[tag]()}
        self._sizes[tag] = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage, _ in self._sizes[tag]:
            storage.resize_(0)
        with contextlib.suppress(AttributeError):  # glibc keeps what was freed, until it is asked
            ctypes.CDLL(None).malloc_trim(0)

    def resume(self, tag: str) -> None:
        """Take it again; what was in it is gone."""
        for storage, size in self._sizes.pop(tag, ()):
            storage.resize_(size)


def _cache_tensors(pool: Any) -> Iterator[torch.Tensor]:
    """The tensors that hold keys and values, and no table of where they are."""
    for name in ("k_buffer", "v_buffer", "kv_buffer"):
        found = getattr(pool, name, None)
        yield from (found if isinstance(found, (list, tuple)) else [] if found is None else [found])
