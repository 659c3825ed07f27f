"""Who writes what, and which pieces make up a range: pure functions over (entry, offset, length).

Ranks may hold the same range: replicas of a whole model, of a shard, of a buffer. Each is written once, by the
one of its holders that has least to write so far; all ranks come to the same result without asking.
"""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint.layout import Piece

Range = tuple[int, int, int]
"""Fingerprint of the entry, first element, number of elements."""


def fingerprint(entry: str) -> int:
    """An int64 for a name, the same in every process."""
    return int.from_bytes(blake2b(entry.encode(), digest_size=8).digest(), signed=True)


def owners(held: Sequence[Sequence[Range]]) -> dict[Range, int]:
    """The rank that writes each range, from what every rank holds."""
    holders: dict[Range, list[int]] = {}
    for rank, ranges in enumerate(held):
        for it in ranges:
            holders.setdefault(it, []).append(rank)
    load = [0] * len(held)
    chosen: dict[Range, int] = {}
    for it, ranks in sorted(holders.items(), key=lambda pair: (len(pair[1]) > 1, -pair[0][2], pair[0])):
        rank = ranks[0] if len(ranks) == 1 else min(ranks, key=lambda rank: (load[rank], rank))
        chosen[it] = rank
        load[rank] += it[2]
    return chosen


def check_covered(entry: str, numel: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Raise `CheckpointError` unless ``ranges``, (offset, length), make up all ``numel`` elements of ``entry``."""
    reached = 0
    for offset, length in sorted(ranges):
        if offset > reached:
            break
        reached = max(reached, offset + length)
    if reached < numel:
        raise CheckpointError(
            f"elements from {reached} of {numel} of {entry} are on no rank, and would not be saved; the strategy that holds them must give them in its shards"
        )


Fragment = tuple[int, Piece, int, int]
"""Index of a file, a piece in it, and the first element and number of elements to take of that piece."""


def fragments(
    index: Mapping[str, Sequence[tuple[int, Piece]]], entry: str, offset: int, numel: int
) -> Iterator[Fragment]:
    """What makes up ``numel`` elements of ``entry`` from ``offset`` on, in order. Raises `CheckpointError` for a gap."""
    reached, end = offset, offset + numel
    for file, piece in index.get(entry, ()):
        begin, stop = piece.offset, piece.offset + piece.numel
        if begin <= reached < stop and reached < end:
            length = min(stop, end) - reached
            yield file, piece, reached - begin, length
            reached += length
    if reached < end:
        raise CheckpointError(
            f"elements {reached} to {end} of {entry} are in none of the files, though it was saved; load another tag"
        )
