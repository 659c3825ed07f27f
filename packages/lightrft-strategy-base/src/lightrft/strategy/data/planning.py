"""Planning micro-batches over all ranks.

Each rank checks its arguments and counts the micro-batches that it needs; all make as many as the rank that needs the most.
This takes one exchange of a few integers.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.config.validation import shown
from lightrft.strategy.arguments import COUNT, FLAG, Expected, refusal
from lightrft.strategy.data.micro_batches import MicroBatch, Planner
from lightrft.strategy.distributed.rank_consensus import RankConsensus

CALL = "plan_micro_batches"
_LENGTHS = Expected(
    "a list, tuple, 1-D tensor or 1-D array of integers", (Sequence, np.ndarray, torch.Tensor), (str, bytes)
)


def plan_micro_batches(
    consensus: RankConsensus, lengths: Sequence[int] | np.ndarray | torch.Tensor, max_tokens: int, padded: bool
) -> tuple[MicroBatch, ...]:
    """Implement `StrategyBase.plan_micro_batches`."""
    planners: list[Planner] = []
    with consensus.together(
        CALL, report=lambda: [planners[0].fewest, int(max_tokens), bool(padded)] if planners else None
    ) as reports:
        expected = {"max_tokens": (max_tokens, COUNT), "padded": (padded, FLAG), "lengths": (lengths, _LENGTHS)}
        for name, (value, allowed) in expected.items():
            if not allowed.matches(value):
                raise refusal(CALL, name, value, allowed)
        checked = _checked_lengths(lengths, int(max_tokens))
        planners.append(Planner(checked, int(max_tokens), padded=bool(padded)))
    fewest, *shared = zip(*reports, strict=True)
    for name, values in zip(("max_tokens", "padded"), shared, strict=True):
        if len(set(values)) > 1:
            given = "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ArgumentError(
                f"{CALL}: expected the same {name} on every rank, got {given}. Pass one value on all ranks"
            )
    return planners[0].plan(max(fewest))


def _checked_lengths(lengths: object, max_tokens: int) -> list[int]:
    """Return ``lengths`` as integers; raise unless all are at least 1 and at most ``max_tokens``."""
    values = _listed(lengths)
    if not values or 1 <= min(values) <= max(values) <= max_tokens:
        return values
    at, value = next((at, value) for at, value in enumerate(values) if not 1 <= value <= max_tokens)
    if value < 1:
        raise ArgumentError(
            f"{CALL}: expected lengths of at least 1 token, got {value} at index {at}. Leave out empty sequences"
        )
    raise ArgumentError(
        f"{CALL}: expected every sequence to fit in max_tokens={max_tokens}, got one of {value} tokens at index {at}. "
        f"Truncate it, or raise max_tokens to at least {max(values)}"
    )


def _listed(lengths: Any) -> list[int]:
    """Return ``lengths`` as a list of integers; raise unless it is one-dimensional, and all are integers."""
    values = lengths.tolist() if isinstance(lengths, (np.ndarray, torch.Tensor)) else list(lengths)
    if not isinstance(values, list):  # a tensor or an array without dimensions
        raise refusal(CALL, "lengths", lengths, _LENGTHS)
    if set(map(type, values)) <= {int}:
        return values
    for at, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ArgumentTypeError(
                f"{CALL}: expected lengths to be {_LENGTHS.words}, got {shown(value)} at index {at}. Pass the number of "
                f"tokens of each sequence"
            )
    return [int(value) for value in values]
