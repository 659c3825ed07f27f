"""Micro-batches by token budget: which of a rank's sequences go through the model together.

A plan depends only on its arguments. It takes two steps, between which the ranks agree on the number of micro-batches:
`Planner.fewest` is the number that one rank needs, and `Planner.plan` divides its sequences into the agreed number.

- Padded, a micro-batch costs count x longest. Taking the longest first, as many as fit, needs the fewest micro-batches
  possible and puts similar lengths together, which saves padding.
- Packed, a micro-batch costs the sum of its lengths. First-fit decreasing needs at most 11/9 of the fewest possible + 6/9
  (Dósa, "The tight bound of first fit decreasing bin-packing algorithm", 2007), but it fills the first micro-batches and
  leaves the last ones small. Putting the longest first into the emptiest balances them: the largest sum is at most 4/3 of the
  best possible (Graham, "Bounds on multiprocessing timing anomalies", 1969). If that exceeds the budget, the best possible
  is more than 3/4 of the budget, so first-fit decreasing is within 4/3 too.
"""

import gc
import heapq
import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import neg

import numpy as np

Group = Sequence[int]
"""Positions of sequences that go together, the longest first."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences of this rank that go through the model together; see `StrategyBase.plan_micro_batches`."""

    indices: tuple[int, ...]
    """Positions of the sequences in ``lengths``. Empty for a filler: this rank has no more sequences, but others do."""
    tokens: int
    """Tokens that the model computes: count x longest if padded, else the sum of the lengths; 0 for a filler."""
    last: bool
    """Whether it is the last of the plan; the same on every rank."""

    @property
    def weight(self) -> float:
        """The factor of the loss: 1, or 0 for a filler."""
        return float(bool(self.indices))


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector, which would search the whole heap for cycles while many small objects are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Planner:
    """One rank's sequences.

    Args:
        lengths: Tokens of each sequence, at least 1 and at most ``max_tokens``.
        max_tokens: The most that a micro-batch may cost.
        padded: Whether a micro-batch costs count x longest; otherwise, it costs the sum of its lengths.
    """

    @_gc_paused()
    def __init__(self, lengths: Sequence[int], max_tokens: int, *, padded: bool) -> None:
        most = len(lengths) * max(lengths, default=1)  # of one micro-batch with all of them
        self._lengths, self._max_tokens, self._padded = lengths, min(max_tokens, most), padded
        values = np.asarray(lengths, dtype=np.int64)
        order = np.argsort(-values, kind="stable")
        self._order, self._descending = tuple(order.tolist()), values[order].tolist()
        self._groups = [] if padded else first_fit(lengths, self._order, max_tokens)

    @property
    def fewest(self) -> int:
        """The number of micro-batches that these sequences need."""
        return count_padded_groups(self._descending, self._max_tokens) if self._padded else len(self._groups)

    @_gc_paused()
    def plan(self, count: int) -> tuple[MicroBatch, ...]:
        """Return ``count`` micro-batches, at least `fewest`, as balanced as the budget allows.

        The costly ones come first, because ranks wait for each other at every micro-batch. Fillers come last, and only if
        there are fewer sequences than micro-batches.
        """
        if count < len(self._order):
            groups = self._divided(count)
        else:
            groups = [*zip(self._order), *[()] * (count - len(self._order))]
        length_of = self._lengths.__getitem__
        if self._padded:
            costs = [len(group) * length_of(group[0]) if group else 0 for group in groups]
        else:
            costs = [sum(map(length_of, group)) for group in groups]
        costly_first = sorted(range(count), key=costs.__getitem__, reverse=True)
        plan = [MicroBatch(tuple(groups[at]), costs[at], False) for at in costly_first]
        return (*plan[:-1], *(replace(micro_batch, last=True) for micro_batch in plan[-1:]))

    def _divided(self, count: int) -> list[Group]:
        if self._padded:
            budget = smallest_budget(self._descending, self._max_tokens, count)
            return split_largest(padded_groups(self._order, self._descending, budget), count)
        even = balanced_groups(self._lengths, self._order, self._max_tokens, count)
        return split_largest(self._groups, count) if even is None else even


def padded_groups(order: Sequence[int], descending: Sequence[int], budget: int) -> list[Group]:
    """Divide ``order``, the longest first, into runs with count x longest within ``budget``: the fewest possible."""
    return [
        order[first : first + size]
        for start, end, size in _equal_groups(descending, budget)
        for first in range(start, end, size)
    ]


def count_padded_groups(descending: Sequence[int], budget: int) -> int:
    """Return how many groups `padded_groups` makes."""
    return sum(-(-(end - start) // size) for start, end, size in _equal_groups(descending, budget))


def _equal_groups(descending: Sequence[int], budget: int) -> Iterator[tuple[int, int, int]]:
    """Yield the start, end and size of adjacent groups of `padded_groups` that have the same size.

    n sequences have at most sqrt(2 n) different sizes, so this is much faster than group by group.
    """
    start = 0
    while start < len(descending):
        size = budget // descending[start]
        longest_of_more = budget // (size + 1)  # the longest sequence that makes a larger group
        end = bisect_left(descending, -longest_of_more, lo=start, key=neg)
        end = min(len(descending), start + -(-(end - start) // size) * size)
        yield start, end, size
        start = end


def smallest_budget(descending: Sequence[int], max_tokens: int, count: int) -> int:
    """Return the smallest budget for which `padded_groups` makes at most ``count`` groups; ``max_tokens`` is enough."""
    least = max(descending[0], -(-sum(descending) // count))

    def is_enough(budget: int) -> bool:
        return count_padded_groups(descending, budget) <= count

    return least + bisect_left(range(least, max_tokens), True, key=is_enough)


def first_fit(lengths: Sequence[int], order: Sequence[int], budget: int) -> list[Group]:
    """Put each of ``order``, the longest first, into the first group that has room for it within ``budget``.

    A tree over the groups holds the most room below each node, so that the first group with room is found in logarithmic
    time.
    """
    bound = min(len(order), 2 * sum(lengths) // budget + 1)  # any two groups together exceed the budget
    leaves = 1 << max(0, bound - 1).bit_length()
    groups = [[index] for index in itertools.takewhile(lambda index: 2 * lengths[index] > budget, order)]
    room = [0] * leaves + [budget - lengths[index] for (index,) in groups] + [budget] * (leaves - len(groups))
    for node in range(leaves - 1, 0, -1):
        room[node] = max(room[2 * node], room[2 * node + 1])
    position = len(groups)
    while position < len(order):
        length = lengths[order[position]]
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(groups):
            groups.append([])
        group, left = groups[node - leaves], room[node]
        while position < len(order) and lengths[order[position]] == length <= left:
            group.append(order[position])
            left -= length
            position += 1
        room[node] = left
        while node > 1:
            node //= 2
            left = max(room[2 * node], room[2 * node + 1])
            if room[node] == left:
                break
            room[node] = left
    return list(groups)


def balanced_groups(lengths: Sequence[int], order: Sequence[int], max_tokens: int, count: int) -> list[Group] | None:
    """Put each of ``order``, the longest first, into the group with the smallest sum so far; None if one exceeds the budget."""
    groups = [[index] for index in order[:count]]
    sums = [lengths[group[0]] * count + at for at, group in enumerate(groups)]  # a sum and its group in one integer
    heapq.heapify(sums)
    for index in order[count:]:
        smallest, length = sums[0], lengths[index]
        if smallest // count + length > max_tokens:
            return None
        groups[smallest % count].append(index)
        heapq.heapreplace(sums, smallest + length * count)
    return list(groups)


def split_largest(groups: Sequence[Group], count: int) -> list[Group]:
    """Halve the group with the most sequences until there are ``count``."""
    of_size: defaultdict[int, list[Group]] = defaultdict(list)
    for group in groups:
        of_size[len(group)].append(group)
    missing = count - len(groups)
    for size in range(max(of_size, default=0), 1, -1):
        if missing <= 0:
            break
        half = (size + 1) // 2
        divided, of_size[size] = of_size[size][:missing], of_size[size][missing:]
        of_size[half] += [group[:half] for group in divided]
        of_size[size - half] += [group[half:] for group in divided]
        missing -= len(divided)
    return [group for same_size in of_size.values() for group in same_size]
