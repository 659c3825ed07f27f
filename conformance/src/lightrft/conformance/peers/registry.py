"""The promises by id. Each module of `lightrft.conformance.peers.promises` adds its own."""

from collections.abc import Callable
from dataclasses import dataclass

from lightrft.conformance.peers.ranks import Ranks

Check = Callable[[Ranks], None]
"""Runs programs and compares; raises `Differs` or `NotOffered`."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a user of a training library may expect, whichever library it is."""

    id: str
    text: str
    check: Check
    smallest_world: int = 1
    """The number of ranks that it takes to break the promise."""


PROMISES: dict[str, Promise] = {}
"""All promises by id."""


def promise(promise_id: str, text: str, *, smallest_world: int = 1) -> Callable[[Check], Check]:
    """Register a check.

    Args:
        promise_id: Two or three words with hyphens.
        text: One sentence, in the terms of any training library.
        smallest_world: The number of ranks that it takes to break the promise.
    """

    def register(check: Check) -> Check:
        PROMISES[promise_id] = Promise(id=promise_id, text=text, check=check, smallest_world=smallest_world)
        return check

    return register
