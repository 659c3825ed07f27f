"""Ranks that fail: the others notice."""

import os
import time

from lightrft.conformance.peers.ranks import Differs, Ranks
from lightrft.conformance.peers.registry import promise
from lightrft.conformance.peers.training import micro_batch, sgd, small_model, train_one
from lightrft.conformance.peers.worker import Rank

ABSENT_SECONDS = 60.0
"""How long a rank stays away; the timeout of the others is `TIMEOUT`."""
TIMEOUT = 5.0


@promise("lost-rank", "If a rank dies, the others raise; they do not wait for it.", smallest_world=2)
def lost_rank(ranks: Ranks) -> None:
    first, *_ = ranks.attempt(train_and_fail, how="die", seconds=60.0)
    if not first.refused:
        raise Differs(f"rank 0 {first}, although the last rank died")


@promise(
    "absent-rank",
    "If a rank never reaches a collective, the others raise after the timeout that the script sets.",
    smallest_world=2,
)
def absent_rank(ranks: Ranks) -> None:
    first, *_ = ranks.attempt(train_and_fail, how="stay away", timeout_seconds=TIMEOUT, seconds=ABSENT_SECONDS / 2)
    if not first.refused:
        raise Differs(f"rank 0 {first}, although the last rank did not come within the timeout of {TIMEOUT:.0f} s")


def train_and_fail(rank: Rank, *, how: str, timeout_seconds: float | None = None) -> None:
    """Two updates; the last rank does not get to the second."""
    loop = rank.loop(timeout_seconds=timeout_seconds)
    model = loop.prepare(small_model(), sgd)
    train_one(loop, model, micro_batch(0, rank.number))
    if rank.number == rank.world - 1:
        if how == "die":
            os._exit(3)
        time.sleep(ABSENT_SECONDS)
    with rank.may_refuse():
        train_one(loop, model, micro_batch(1, rank.number))
        loop.weights(model)
