"""Defects of plans of micro-batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy, MicroBatch, StrategyBase
from lightrft.strategy.data import micro_batches

# Some overridden methods are final: a type checker would find these saboteurs.
# mypy: disable-error-code="misc"

Plan = tuple[MicroBatch, ...]


class PlanHooks(StrategyBase):
    """Hooks before and after plan_micro_batches."""

    def plan_micro_batches(self, lengths: Any, *, max_tokens: int, padded: bool) -> Plan:
        plan = super().plan_micro_batches(self.given(lengths, max_tokens), max_tokens=max_tokens, padded=padded)
        return self.planned(plan, list(lengths), max_tokens, padded)

    def given(self, lengths: object, max_tokens: int) -> Any:
        """Return the lengths to plan."""
        return lengths

    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        """Return the plan to return."""
        return plan


def in_order(groups: Sequence[Sequence[int]], lengths: Sequence[int], padded: bool) -> Plan:
    """A plan of these groups."""
    costs = [len(group) * lengths[group[0]] if padded else sum(lengths[at] for at in group) for group in groups]
    return tuple(
        MicroBatch(tuple(group), cost, at == len(groups) - 1)
        for at, (group, cost) in enumerate(zip(groups, costs, strict=True))
    )


@saboteur("BATCH-1")
class LosesASequence(PlanHooks, FakeStrategy):
    """The shortest sequence of a padded micro-batch of three or more is left out."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        return tuple(
            replace(
                micro_batch,
                indices=micro_batch.indices[:-1],
                tokens=micro_batch.tokens // len(micro_batch.indices) * (len(micro_batch.indices) - 1),
            )
            if len(micro_batch.indices) > 2 and padded
            else micro_batch
            for micro_batch in plan
        )


@saboteur("BATCH-1")
class PaddingIsFree(PlanHooks, FakeStrategy):
    """A padded micro-batch counts the sum of its lengths."""

    def plan_micro_batches(self, lengths: object, *, max_tokens: int, padded: bool) -> Plan:
        return super().plan_micro_batches(lengths, max_tokens=max_tokens, padded=bool(padded) and False)


@saboteur("BATCH-1")
class TakesLongSequences(PlanHooks, FakeStrategy):
    """A sequence over the budget is truncated in the plan, without an error."""

    @override
    def given(self, lengths: Any, max_tokens: int) -> Any:
        return [
            min(length, max_tokens) if type(length) is type(max_tokens) is int and max_tokens > 0 else length
            for length in lengths
        ]


@saboteur("BATCH-1", world=2)
class AsManyAsNeeded(PlanHooks, PlainStrategy):
    """Each rank makes as many micro-batches as it needs."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        planner = micro_batches.Planner(lengths, max_tokens, padded=padded)
        return planner.plan(planner.fewest)


@saboteur("BATCH-1", world=2)
class FillersRepeat(PlanHooks, PlainStrategy):
    """A filler repeats the shortest sequence, with its weight."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        if not lengths:
            return plan
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        return tuple(replace(micro_batch, indices=micro_batch.indices or (shortest,)) for micro_batch in plan)


@saboteur("BATCH-1", world=2)
class OnlyThisRankRaises(PlanHooks, PlainStrategy):
    """Ranks with valid arguments continue with their own plan if those of another rank are invalid."""

    def plan_micro_batches(self, lengths: Any, *, max_tokens: int, padded: bool) -> Plan:
        try:
            return super().plan_micro_batches(lengths, max_tokens=max_tokens, padded=padded)
        except Exception as error:
            if "failed on another rank" not in str(error):
                raise
            planner = micro_batches.Planner(lengths, max_tokens, padded=padded)
            return planner.plan(planner.fewest)


@saboteur("BATCH-1", world=2)
class BudgetOfRank0(PlanHooks, PlainStrategy):
    """The budget of rank 0 is used on all ranks, without an error."""

    def plan_micro_batches(self, lengths: object, *, max_tokens: int, padded: bool) -> Plan:
        if isinstance(max_tokens, int) and max_tokens > 0:
            max_tokens = int(self.all_gather(max_tokens)[0])
        return super().plan_micro_batches(lengths, max_tokens=max_tokens, padded=padded)


class _Heavy(MicroBatch):
    weight = 1.0


@saboteur("BATCH-2", world=2)
class FillersCount(PlanHooks, PlainStrategy):
    """A filler has the same weight as any micro-batch."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        return tuple(_Heavy(micro_batch.indices, micro_batch.tokens, micro_batch.last) for micro_batch in plan)


@saboteur("BATCH-2", world=2)
class LastWithSequences(PlanHooks, PlainStrategy):
    """The last micro-batch of a plan is the last with sequences of this rank."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        last = max((at for at, micro_batch in enumerate(plan) if micro_batch.indices), default=0)
        return tuple(replace(micro_batch, last=at == last) for at, micro_batch in enumerate(plan))


@saboteur("BATCH-3")
class NextFit(PlanHooks, FakeStrategy):
    """Sequences go in order, and a micro-batch ends at the first that does not fit."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        groups: list[list[int]] = []
        for at in range(len(lengths)):
            together = [*groups[-1], at] if groups else [at]
            longest = max(lengths[index] for index in together)
            cost = len(together) * longest if padded else sum(lengths[index] for index in together)
            if groups and cost <= max_tokens:
                groups[-1] = together
            else:
                groups.append([at])
        return in_order([sorted(group, key=lambda at: -lengths[at]) for group in groups], lengths, padded)


@saboteur("BATCH-3")
class FillsTheFirst(PlanHooks, FakeStrategy):
    """Packed, the first micro-batches are filled and the last is left with the rest."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        if padded:
            return plan
        order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
        return in_order(micro_batches.first_fit(lengths, order, max_tokens), lengths, padded)


@saboteur("BATCH-3")
class ShufflesThePlan(PlanHooks, FakeStrategy):
    """The order of micro-batches comes from torch's global random stream."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        order = torch.randperm(len(plan)).tolist()
        return in_order([plan[at].indices for at in order], lengths, padded)


@saboteur("BATCH-3")
class EachAlone(PlanHooks, FakeStrategy):
    """Each sequence is a separate micro-batch."""

    @override
    def planned(self, plan: Plan, lengths: list[int], max_tokens: int, padded: bool) -> Plan:
        order = sorted(range(len(lengths)), key=lambda at: -lengths[at])
        return in_order([[at] for at in order], lengths, padded)
