"""The families of clauses. A clause's id is the name of its family and a number, such as ``OPT-3``."""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TypeVar

T = TypeVar("T")

FAMILIES = {
    "LIFE": "Lifecycle and process group",
    "LOG": "Logging",
    "COLL": "Collectives",
    "PREP": "Preparing models",
    "DATA": "Data",
    "SP": "Sequence parallelism",
    "OPT": "Gradients and updates",
    "NORM": "Losses over items",
    "BATCH": "Micro-batches by token budget",
    "LOGP": "Log-probabilities",
    "OFF": "Offloading",
    "EMA": "Moving averages",
    "CKPT": "Checkpoints",
    "EXPORT": "Export",
    "ENG": "Rollout engines",
    "SYNC": "Weight sync",
    "GEN": "Generation",
    "ALL": "All together",
}
"""Title by family, in the order of the contract."""


def by_family(clauses: Iterable[T], id_of: Callable[[T], str]) -> dict[str, list[T]]:
    """Group ``clauses`` by the title of their family, in the order of `FAMILIES`, then by number.

    A clause of a family that this version does not know comes last, under the name of its family.
    """
    names = list(FAMILIES)

    def rank(clause: T) -> tuple[int, str, int]:
        family, _, number = id_of(clause).partition("-")
        return (names.index(family) if family in FAMILIES else len(names)), family, int(number)

    groups = groupby(sorted(clauses, key=rank), lambda clause: id_of(clause).partition("-")[0])
    return {FAMILIES.get(family, family): list(members) for family, members in groups}
