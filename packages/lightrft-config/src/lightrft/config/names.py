"""Suggesting the name that a user probably meant."""

from collections.abc import Collection, Iterable
from difflib import SequenceMatcher

NEAR_MISS = 0.87
"""Similarity (0 to 1) from which an unknown name counts as a misspelling of a known one.

``train_batch_sise`` scores 0.94 against ``train_batch_size``. ``rollout_batch_size``, a legitimate argument of many
scripts, scores 0.86 against ``micro_rollout_batch_size``.
"""


def similarity(left: str, right: str) -> float:
    """Return the similarity of two names, from 0 to 1. Ignores case; a hyphen equals an underscore."""
    normal_left, normal_right = left.lower().replace("-", "_"), right.lower().replace("-", "_")
    return SequenceMatcher(None, normal_left, normal_right, autojunk=False).ratio()


def nearest(name: str, known: Iterable[str], at_least: float = 0.6) -> str | None:
    """Return the known name most similar to ``name``.

    Args:
        name: The name to look up.
        known: The candidates.
        at_least: Minimum similarity, from 0 to 1.

    Returns:
        The best candidate, or None if no candidate reaches ``at_least``.
    """
    score, best = max(((similarity(name, candidate), candidate) for candidate in known), default=(0.0, ""))
    return best if score >= at_least else None


def near_miss(name: str, known: Collection[str]) -> str | None:
    """Return the known name of which ``name`` is probably a misspelling, or None.

    A misspelling is one edit away from the known name, or at least `NEAR_MISS` similar to it.
    """
    one_edit_away = [candidate for candidate in known if _is_one_edit(name, candidate)]
    return nearest(name, one_edit_away) or nearest(name, known, at_least=NEAR_MISS)


def _is_one_edit(typed: str, meant: str) -> bool:
    """Whether one deletion, insertion, replacement or swap of neighbours separates the names.

    For names of three characters only a swap counts; shorter names never match.
    """
    start = next(
        (index for index, pair in enumerate(zip(typed, meant, strict=False)) if len(set(pair)) > 1), len(typed)
    )
    if typed == meant or len(meant) < 3:
        return False
    head, tail = typed[:start], typed[start:]
    swapped = head + tail[1:2] + tail[:1] + tail[2:]
    if len(meant) == 3:
        return swapped == meant
    deleted, inserted, replaced = meant[start + 1 :] == tail, tail[1:] == meant[start:], tail[1:] == meant[start + 1 :]
    return deleted or inserted or replaced or swapped == meant
