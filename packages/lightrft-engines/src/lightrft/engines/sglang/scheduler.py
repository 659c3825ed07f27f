"""Runs in the processes that SGLang starts for the model: applies the patches, and loads buckets of weights."""

from collections.abc import Sequence
from typing import Any

import torch

from lightrft.engines.sglang import patches
from lightrft.engines.sglang.shared_memory import checksum, from_json, views
from lightrft.engines.sglang.unused_weights import unused_weights, watched


def run_scheduler(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang's entry point of a scheduler process, with the patches applied."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    patches.apply_in_scheduler(server_args.dp_size)
    run_scheduler_process(server_args, *args, **kwargs)


def load_bucket(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load what `Server.load` sent, and drop the cached embeddings of images, which belong to older weights.

    Args:
        model: SGLang's model.
        named_tensors: The plan of the bucket, and the memory block with its weights.

    Raises:
        ValueError: The block's checksum is wrong, or the model does not use one of the weights.
    """
    from sglang.srt.managers import mm_schedule

    parts = dict(named_tensors)
    plan, block = from_json(parts["plan"]), parts["bucket"]
    size = plan["size"]
    if plan["checksum"] is not None and (received := checksum(block[:size])) != plan["checksum"]:
        raise ValueError(f"expected a bucket with checksum {plan['checksum']:#x}, got one with {received:#x}")
    weights = watched(views(block, plan["entries"]))
    model.load_weights(weights)  # type: ignore[operator]
    unused = [name for name in unused_weights(weights) if not name.endswith("rotary_emb.inv_freq")]
    if unused and plan["complete"]:
        raise ValueError(
            f"SGLang's {type(model).__name__} does not use {len(unused)} of the weights, the first is {unused[0]}, so it "
            f"does not compute the same as the actor. Use another engine"
        )
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()
