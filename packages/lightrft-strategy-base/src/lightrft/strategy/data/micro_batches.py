"""Micro-batches by token budget: which of a rank's sequences go through the model together.

A plan depends only on its arguments. It takes two steps, between which the ranks agree on the number of micro-batches:
`Planner.fewest` is the number that one rank needs, and `Planner.plan` divides its sequences into the number that all make.

- Padded, a micro-batch costs count x longest. Taking the longest first, as many as fit, needs the fewest micro-batches
  possible and puts similar lengths together, which saves padding.
- Packed, a micro-batch costs the sum of its lengths. First-fit decreasing needs at most 11/9 of the fewest possible + 6/9
  (Dósa, "The tight bound of first fit decreasing bin-packing algorithm", 2007), but it fills the first micro-batches and
  leaves the last ones small. Putting the longest first into the emptiest balances them: the largest sum is at most 4/3 of the
  best possible (Graham, "Bounds on multiprocessing timing anomalies", 1969). If that exceeds the budget, the best possible
  is more than 3/4 of the budget, so first-fit decreasing is within 4/3 too.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

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


class Planner:
    """One rank's sequences.

    Args:
        lengths: Tokens of each sequence, at least 1 and at most ``max_tokens``.
        max_tokens: The most that a micro-batch may cost.
        padded: Whether a micro-batch costs count x longest; otherwise, it costs the sum of its lengths.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int, *, padded: bool) -> None:
        self._lengths, self._max_tokens, self._padded = lengths, max_tokens, padded
        self._order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        if padded:
            self._groups = longest_together(lengths, self._order, max_tokens)
        else:
            self._groups = first_fit(lengths, self._order, max_tokens)

    @property
    def fewest(self) -> int:
        """The number of micro-batches that these sequences need."""
        return len(self._groups)

    def plan(self, count: int) -> tuple[MicroBatch, ...]:
        """Return ``count`` micro-batches, at least `fewest`, as balanced as the budget allows.

        The costly ones come first, because ranks wait for each other at every micro-batch. Fillers come last, and only if
        there are fewer sequences than micro-batches.
        """
        groups = self._divided(min(count, len(self._lengths)))
        groups += [()] * (count - len(groups))
        groups.sort(key=self._cost, reverse=True)
        return tuple(
            MicroBatch(tuple(group), self._cost(group), number == count) for number, group in enumerate(groups, 1)
        )

    def _divided(self, count: int) -> list[Group]:
        if self._padded:
            budget = smallest_budget(self._lengths, self._order, self._max_tokens, count)
            return halved(longest_together(self._lengths, self._order, budget), count)
        even = longest_to_emptiest(self._lengths, self._order, count)
        if all(self._cost(group) <= self._max_tokens for group in even):
            return even
        return halved(self._groups, count)

    def _cost(self, group: Group) -> int:
        if self._padded and group:
            return len(group) * self._lengths[group[0]]
        return sum(map(self._lengths.__getitem__, group))


def longest_together(lengths: Sequence[int], order: Sequence[int], budget: int) -> list[Group]:
    """Divide ``order``, the longest first, into runs with count x longest within ``budget``: the fewest possible."""
    groups: list[Group] = []
    start = 0
    while start < len(order):
        end = start + budget // lengths[order[start]]
        groups.append(order[start:end])
        start = end
    return groups


def smallest_budget(lengths: Sequence[int], order: Sequence[int], max_tokens: int, count: int) -> int:
    """Return the smallest budget for which `longest_together` makes at most ``count`` groups; ``max_tokens`` is enough."""
    descending = [lengths[index] for index in order]

    def is_enough(budget: int) -> bool:
        start = groups = 0
        while start < len(descending) and groups <= count:
            start += budget // descending[start]
            groups += 1
        return groups <= count

    least = max(descending[0], -(-sum(descending) // count)) if count else 0
    return least + bisect_left(range(least, max_tokens), True, key=is_enough)


def first_fit(lengths: Sequence[int], order: Sequence[int], budget: int) -> list[Group]:
    """Put each of ``order``, the longest first, into the first group that has room for it within ``budget``.

    A tree over the groups holds the most room below each node, so that the first group with room is found in logarithmic
    time.
    """
    bound = min(len(order), 2 * sum(lengths) // budget + 1)  # any two groups together exceed the budget
    leaves = 1 << max(0, bound - 1).bit_length()
    room = [budget] * (2 * leaves)
    groups: list[list[int]] = []
    position = 0
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


def longest_to_emptiest(lengths: Sequence[int], order: Sequence[int], count: int) -> list[Group]:
    """Put each of ``order``, the longest first, into the group with the smallest sum so far."""
    groups = [[index] for index in order[:count]]
    sums = [lengths[group[0]] * count + at for at, group in enumerate(groups)]  # a sum and its group in one integer
    heapq.heapify(sums)
    for index in order[count:]:
        smallest = sums[0]
        groups[smallest % count].append(index)
        heapq.heapreplace(sums, smallest + lengths[index] * count)
    return list(groups)


def halved(groups: Sequence[Group], count: int) -> list[Group]:
    """Halve the group with the most sequences until there are ``count``."""
    divided = list(groups)
    most = [(-len(group), at) for at, group in enumerate(divided)]
    heapq.heapify(most)
    while len(divided) < count:
        at = most[0][1]
        group = divided[at]
        half = (len(group) + 1) // 2
        divided[at], rest = group[:half], group[half:]
        divided.append(rest)
        heapq.heapreplace(most, (-half, at))
        heapq.heappush(most, (-len(rest), len(divided) - 1))
    return divided
