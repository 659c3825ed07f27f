"""Finding the name that somebody probably meant."""

from collections.abc import Iterable
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
