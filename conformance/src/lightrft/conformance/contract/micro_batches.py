"""BATCH: micro-batches by token budget."""

from collections.abc import Iterator, Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Record, Target, show
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.program_parts import SEEDS, program, trained
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS, close, first_mismatch

BUDGET = 12


def plan(lengths: Sequence[Sequence[object]], max_tokens: object = BUDGET, *, padded: object) -> Operation:
    """Plan the sequences of each rank, of these ``lengths``."""
    return {
        "do": "plan",
        "lengths": [list(rank_lengths) for rank_lengths in lengths],
        "max_tokens": max_tokens,
        "padded": padded,
    }


def of_ranks(target: Target, *lengths: Sequence[object]) -> list[Sequence[object]]:
    """The sequences of each rank: ``lengths`` in turn."""
    return [lengths[rank % len(lengths)] for rank in range(target.world)]


def drawn_plans(target: Target) -> st.SearchStrategy[Program]:
    """Programs with one plan of few and short sequences."""
    rank_lengths = st.lists(st.integers(1, BUDGET), max_size=6)
    ranks = st.lists(rank_lengths, min_size=target.world, max_size=target.world)
    return st.builds(lambda lengths, padded: program(target, plan(lengths, padded=padded)), ranks, st.booleans())


@CONTRACT.add
class WithinTheBudget(Clause):
    """plan_micro_batches assigns every sequence to exactly one micro-batch of its rank, none above the budget (padded:
    count x longest; packed: the sum), and makes the same number of micro-batches on every rank, even if ranks have
    different numbers of sequences, or none. Fillers, micro-batches without sequences, have weight 0. A sequence longer
    than the budget raises an error that gives its length. Other invalid arguments, and arguments that differ between
    ranks, raise an error too. Every rank raises, even if only one is wrong."""

    id = "BATCH-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        many, few = (5, 3, 12, 1, 1, 7, 2, 6, 4, 4), (2, 9)
        ranks = [
            of_ranks(target, many, few),
            of_ranks(target, few, ()),
            of_ranks(target, (), many),
            of_ranks(target, ()),
        ]
        plans = [plan(lengths, padded=padded) for lengths in ranks for padded in (True, False)]
        last = target.world - 1
        wrong: list[tuple[object, ...]] = [(3, BUDGET + 1), (3, 0), (3, -2), (3, 1.5), (True,), ("3",)]
        refused = [
            {**plan([few] * last + [rank_lengths], padded=padded), "may_fail": True}
            for rank_lengths in wrong
            for padded in (True, False)
        ]
        refused += [
            {**plan([few] * target.world, max_tokens, padded=padded), "may_fail": True}
            for max_tokens, padded in [(0, True), ([BUDGET] * last + [-1], True), (BUDGET, [True] * last + ["yes"])]
        ]
        if last:
            refused += [
                {**plan([few] * target.world, [BUDGET] * last + [BUDGET + 1], padded=True), "may_fail": True},
                {**plan([few] * target.world, padded=[True] * last + [False]), "may_fail": True},
            ]
        return [program(target, *plans), program(target, *refused, plans[0])]

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return drawn_plans(target)

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("plan"):
            if operation.get("may_fail"):
                for rank, observed in enumerate(seen):
                    where = f"rank {rank}, plan (operation {index})"
                    self.require_error(observed, "LightRFTError", "plan_micro_batches", *_named(operation), where=where)
                continue
            numbers = [len(made) for made in seen]
            self.require(
                len(set(numbers)) == 1, f"expected the same number of micro-batches on every rank, got {numbers}"
            )
            for rank, made in enumerate(seen):
                self._check_rank(f"rank {rank}", operation["lengths"][rank], operation["padded"], made)

    def _check_rank(self, where: str, lengths: Sequence[int], padded: bool, made: Sequence[Record]) -> None:
        given = sorted(index for micro_batch in made for index in micro_batch["indices"])
        self.require(
            given == list(range(len(lengths))),
            f"{where}: expected each of {len(lengths)} sequences in one micro-batch, got {given}",
        )
        for number, micro_batch in enumerate(made):
            group = [lengths[index] for index in micro_batch["indices"]]
            cost = (len(group) * max(group) if padded else sum(group)) if group else 0
            self.require(cost <= BUDGET, f"{where}: a micro-batch of the lengths {group} costs {cost}, over {BUDGET}")
            expected = {"tokens": cost, "last": number == len(made) - 1, "weight": float(bool(group))}
            reported = {name: micro_batch[name] for name in expected}
            self.require(reported == expected, f"{where}: expected {show(expected)}, got {show(reported)}")


def _named(operation: Operation) -> list[str]:
    """What the error for this plan must name."""
    lengths = [length for rank_lengths in operation["lengths"] for length in rank_lengths]
    longer = [length for length in lengths if isinstance(length, int) and length > BUDGET]
    if longer:
        return [str(longer[0])]
    if isinstance(operation["padded"], list):
        return ["padded"]
    return [] if operation["max_tokens"] == BUDGET else ["max_tokens"]


@CONTRACT.add
class FillersTakePart(Clause):
    """A rank that has no sequences for a micro-batch still takes part in it: the plan contains a filler of weight 0.
    Training with the plan, with the number of tokens as the denominator of each loss, equals the reference, a single
    update from the mean loss per token."""

    id = "BATCH-2"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        many, few = range(9), (9, 12)
        updates = [of_ranks(target, many, ()), of_ranks(target, (), few), of_ranks(target, few, many)]
        return [self._program(target, updates, padded) for padded in (True, False)]

    def _program(
        self,
        target: Target,
        updates: Sequence[Sequence[Sequence[object]]],
        padded: bool,
        kind: str = "language",
        seed: int = 1,
    ) -> Program:
        train: Operation = {"do": "train_planned", "model": "a", "max_tokens": BUDGET, "padded": padded}
        operations = [{**train, "sequences": [list(rank_lengths) for rank_lengths in ranks]} for ranks in updates]
        return program(target, *trained(kind=kind, seed=seed), *operations, READ_WEIGHTS)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        rank_lengths = st.lists(st.integers(0, 200), max_size=8)
        updates = st.lists(
            st.lists(rank_lengths, min_size=target.world, max_size=target.world).filter(any), min_size=1, max_size=2
        )
        kinds = st.sampled_from(["language", "regressor"])
        return st.builds(self._program, st.just(target), updates, st.booleans(), kinds, SEEDS)

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("train_planned"):
            expected = execution.predicted()[index]
            for rank, result in enumerate(seen):
                where = f"rank {rank}, update (operation {index})"
                missing = max(0, result["micro_batches"] - len(operation["sequences"][rank]))
                self.require(
                    result["fillers"] >= missing, f"{where}: expected {missing} fillers, got {result['fillers']}"
                )
                self.require(result["applied"], f"{where}: the update was not applied")
                self.require(
                    result["denominator"] == expected["denominator"],
                    f"{where}: expected the denominator {expected['denominator']}, got {result['denominator']}",
                )
                self.require(
                    close(result["grad_norm"], expected["grad_norm"], 1e-4),
                    f"{where}: expected the gradient norm {expected['grad_norm']}, got {result['grad_norm']}",
                )
        index, _, seen = list(execution.each("weights"))[-1]
        mismatch = first_mismatch(execution, index, seen[0], tolerances.OTHER_SUMMATION_ORDER)
        self.require(mismatch is None, f"the weights do not match the reference: {mismatch}")
        self.require_same_on_all_ranks(execution, "weights")


@CONTRACT.add
class BalancedPlans(Clause):
    """A plan depends only on the arguments. The number of micro-batches is the largest that any rank needs, at most
    11/9 of that rank's optimum + 1. If packed, the largest sum is at most 4/3 of the best possible for that number."""

    id = "BATCH-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        lists = [(1, 12, 1, 12, 1, 12), (2,) * 8, (6, 6, 4, 4, 4), (5, 3, 12, 1, 1, 7), (8, 1, 1)]
        ranks = [of_ranks(target, rank_lengths) for rank_lengths in lists] + [of_ranks(target, lists[1], lists[4])]
        return [self._program(target, lengths, padded) for lengths in ranks for padded in (True, False)]

    def _program(self, target: Target, lengths: Sequence[Sequence[object]], padded: bool) -> Program:
        planned, other = plan(lengths, padded=padded), plan(of_ranks(target, (9, 2, 2)), padded=not padded)
        return program(target, planned, {"do": "seed", "value": 5}, {"do": "draw"}, other, planned)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return drawn_plans(target).map(
            lambda drawn: self._program(target, drawn.operations[0]["lengths"], drawn.operations[0]["padded"])
        )

    @override
    def check(self, execution: Execution) -> None:
        (_, operation, seen), _, (_, _, again) = execution.each("plan")
        self.require(seen == again, f"the same arguments made another plan: first {show(seen)}, then {show(again)}")
        lengths, padded = operation["lengths"], operation["padded"]
        possible = [best_division(rank_lengths, padded=padded) for rank_lengths in lengths]
        fewest = max(min(number for number, largest in best.items() if largest <= BUDGET) for best in possible)
        for rank, made in enumerate(seen):
            bound = 11 / 9 * fewest + 1 if fewest else 0
            self.require(
                len(made) <= bound,
                f"rank {rank}: expected at most 11/9 x {fewest} + 1 micro-batches, got {len(made)} for the lengths {lengths}",
            )
            if not padded:
                smallest = min(largest for number, largest in possible[rank].items() if number <= len(made))
                largest = max((micro_batch["tokens"] for micro_batch in made), default=0)
                self.require(
                    largest <= 4 / 3 * smallest,
                    f"rank {rank}: expected sums of at most 4/3 x {smallest} for the lengths {lengths[rank]} in {len(made)} "
                    f"micro-batches, got {largest}",
                )


def best_division(lengths: Sequence[int], *, padded: bool) -> dict[int, int]:
    """By number of groups, the smallest possible cost of the most costly group, over all divisions of ``lengths``."""
    best: dict[int, int] = {}
    for groups in divisions(lengths):
        largest = max((len(group) * max(group) if padded else sum(group) for group in groups), default=0)
        best[len(groups)] = min(largest, best.get(len(groups), largest))
    return best


def divisions(lengths: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to divide ``lengths`` into groups."""
    if not lengths:
        yield []
        return
    first, *rest = lengths
    for groups in divisions(rest):
        yield [[first], *groups]
        for at, group in enumerate(groups):
            yield [*groups[:at], [first, *group], *groups[at + 1 :]]
