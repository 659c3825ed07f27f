"""Judges one target, promise by promise."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from lightrft.conformance.peers.promises import by_family
from lightrft.conformance.peers.protocol import NotOffered
from lightrft.conformance.peers.ranks import Differs, NotJudged, Ranks
from lightrft.conformance.peers.registry import PROMISES, Promise

Verdict = Literal["holds", "differs", "not offered", "not judged"]
"""A program cannot judge whether a difference is documented; the reader decides that."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The verdict on one promise."""

    promise: str
    verdict: Verdict
    detail: str = ""
    """What differs, what is not offered, or why it was not judged."""
    link: str = ""
    """Where the documentation says what is not offered."""

    def to_dict(self) -> dict[str, str]:
        """As plain data."""
        return asdict(self)


def judge_one(promise: Promise, ranks: Ranks) -> Result:
    """Judge one promise.

    Args:
        promise: What to judge.
        ranks: The target.

    Returns:
        The verdict. An error of the target is a difference; one of the suite itself propagates.
    """
    if ranks.world < promise.smallest_world:
        return Result(promise=promise.id, verdict="not offered", detail="it is one process")
    ranks.begin()
    try:
        promise.check(ranks)
    except NotOffered as missing:
        return Result(promise=promise.id, verdict="not offered", detail=missing.what, link=missing.link)
    except Differs as difference:
        return Result(promise=promise.id, verdict="differs", detail=str(difference))
    except NotJudged as reason:
        return Result(promise=promise.id, verdict="not judged", detail=str(reason))
    return Result(promise=promise.id, verdict="holds")


def judge(
    target: str,
    *,
    world: int = 2,
    only: Iterable[str] = (),
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Judge a target.

    Args:
        target: ``module:attribute`` of a callable that takes `LoopSettings` and returns a `TrainingLoop`.
        world: The number of ranks.
        only: The ids of the promises to judge; by default all.
        on_result: Called with each result as soon as it is known.

    Returns:
        A result per promise, in the order of the table.

    Raises:
        KeyError: An unknown id.
    """
    chosen = [PROMISES[name] for name in only] or [each for family in by_family().values() for each in family]
    results = []
    with Ranks(target, world) as ranks:
        for promise in chosen:
            results.append(judge_one(promise, ranks))
            on_result(results[-1])
    return results
