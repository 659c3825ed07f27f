"""How hard to look: profiles, from a few seconds to a night."""

from dataclasses import dataclass
from typing import Literal

ProfileName = Literal["smoke", "ci", "certify", "nightly"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How many programs are searched for each clause, and how they are drawn."""

    name: ProfileName
    examples: int
    """Programs drawn for a clause that has any to draw; witnesses come on top."""
    random: bool = False
    """Draw others each time, and keep those that failed for the next time."""


PROFILES: dict[str, Profile] = {
    "smoke": Profile(name="smoke", examples=0),
    "ci": Profile(name="ci", examples=12),
    "certify": Profile(name="certify", examples=200),
    "nightly": Profile(name="nightly", examples=500, random=True),
}
