"""Finding the name that somebody probably meant."""

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher

NEAR_MISS = 0.87
"""Similarity (0 to 1) from which an unknown name is taken for a typing error of a known one.

``train_batch_sise`` is 0.94 from ``train_batch_size``; ``rollout_batch_size``, a legitimate argument of
many scripts, is 0.86 from ``micro_rollout_batch_size``.
"""


def similarity(left: str, right: str) -> float:
    """How alike two names are, 0 to 1, case and hyphens aside."""
    normal_left, normal_right = left.lower().replace("-", "_"), right.lower().replace("-", "_")
    return SequenceMatcher(None, normal_left, normal_right, autojunk=False).ratio()


def nearest(name: str, known: Iterable[str], at_least: float = 0.6) -> str | None:
    """The known name most like ``name``, or None where none is at least ``at_least`` like it."""
    score, best = max(((similarity(name, candidate), candidate) for candidate in known), default=(0.0, ""))
    return best if score >= at_least else None


def near_miss(name: str, known: Collection[str]) -> str | None:
    """The known name of which ``name`` is probably a typing error, or None: very alike, or, if short, one slip away."""
    return nearest(name, [it for it in known if _one_slip(name, it)]) or nearest(name, known, at_least=NEAR_MISS)


def _one_slip(typed: str, meant: str) -> bool:
    """Whether one character was left out, put in, replaced, or swapped with the next; of up to three only swapped."""
    start = next((at for at, pair in enumerate(zip(typed, meant, strict=False)) if len(set(pair)) > 1), len(typed))
    if typed == meant or len(meant) < 3:
        return False
    head, tail = typed[:start], typed[start:]
    swapped = head + tail[1:2] + tail[:1] + tail[2:]
    if len(meant) == 3:
        return swapped == meant
    left_out, put_in, replaced = meant[start + 1 :] == tail, tail[1:] == meant[start:], tail[1:] == meant[start + 1 :]
    return left_out or put_in or replaced or swapped == meant
