"""Profiles: how many programs to draw, from none to enough for a night; and how many processes."""

from dataclasses import dataclass
from typing import Literal

MOST_PROCESSES = 256
"""The most ranks, and the most jobs times ranks, to start on this machine.

Each rank is a process that imports torch, so that a mistyped number would exhaust the machine's memory.
"""
ProfileName = Literal["smoke", "ci", "certify", "nightly"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How many programs are drawn for each clause, and how."""

    name: ProfileName
    examples: int
    """The number of programs drawn for a clause that draws any, in addition to its pinned examples."""
    random: bool = False
    """Draw different programs in each run, and keep failing ones for the next run. Otherwise the seed decides."""


PROFILES: dict[str, Profile] = {
    "smoke": Profile(name="smoke", examples=0),
    "ci": Profile(name="ci", examples=12),
    "certify": Profile(name="certify", examples=200),
    "nightly": Profile(name="nightly", examples=500, random=True),
}
