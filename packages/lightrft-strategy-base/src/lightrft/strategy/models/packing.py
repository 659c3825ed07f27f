"""Packed sequences: several in one row, whose position ids restart, without an attention mask.

Models of transformers look for them while they make their masks, if there is no cache. A model that does not would attend
across the sequences without an error: its attention has no position ids, a prefix is before them, or a state runs through the
row. So a model is tried once before it gets packed sequences.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def packed_starts(
    position_ids: object, attention_mask: torch.Tensor | None, input_ids: torch.Tensor
) -> torch.Tensor | None:
    """Return where a further sequence starts, (B or 1, T - 1) for all tokens but the first; None without such positions."""
    shapes = {tuple(input_ids.shape), (1, input_ids.shape[1])}
    if (
        attention_mask is not None
        or not isinstance(position_ids, torch.Tensor)
        or tuple(position_ids.shape) not in shapes
    ):
        return None
    return position_ids.diff(dim=1) != 1


def keeps_packed_apart(
    logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], input_ids: torch.Tensor
) -> bool:
    """Return whether no packed sequence depends on those before it.

    The second sequence of a row is two tokens of the batch. Other tokens before it must not change its logits: not even by
    rounding, since both rows are in one batch. A state that runs through a row may change them by very little at first.

    Args:
        logits_of: Takes tokens and position ids, each (2, 4); returns logits (2, 4, V). Called once.
        input_ids: (B, T), T of at least 2.
    """
    before = torch.tensor([[0, 0], [1, 1]], device=input_ids.device, dtype=input_ids.dtype)
    tokens = torch.cat([before, input_ids[:1, -2:].expand(2, -1)], dim=1)
    logits = logits_of(tokens, torch.tensor([[0, 1, 0, 1]] * 2, device=input_ids.device))[:, 2:]
    return torch.equal(*logits.nan_to_num())


@contextmanager
def without_cache(module: nn.Module) -> Iterator[None]:
    """Turn off the cache in the configurations of ``module`` and its parts: the forward of a wrapper may take no argument."""
    configs: dict[int, Any] = {
        id(config): config for part in module.modules() if _uses_cache(config := getattr(part, "config", None))
    }
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def _uses_cache(config: object) -> bool:
    return getattr(config, "use_cache", None) is True
