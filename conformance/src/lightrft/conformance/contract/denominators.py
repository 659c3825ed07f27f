"""NORM: losses that are sums over items, such as tokens, with their denominators."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error, show
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.program_parts import BF16, FP32, SEEDS, micro_batch, program, trained, updates
from lightrft.conformance.contract.reference_checks import (
    READ_STATE,
    READ_WEIGHTS,
    assert_close,
    assert_flags,
    assert_norms,
    assert_unchanged,
    reference_weights,
)
from lightrft.conformance.interpreter.denominators import FORMS

Assignment = Sequence[Sequence[Sequence[int]]]
"""The sequences of one update: by micro-batch, then by rank."""
SEQUENCES = range(9)


def round_robin(numbers: Sequence[int], micro_batches: int, ranks: int) -> Assignment:
    """Assign the sequences one by one to the micro-batches: the first of each rank, then the second of each rank, and so on."""
    slots = micro_batches * ranks
    return [[list(numbers[index * ranks + rank :: slots]) for rank in range(ranks)] for index in range(micro_batches)]


def skewed(numbers: Sequence[int], micro_batches: int, ranks: int) -> Assignment:
    """Assign one sequence to each of the last micro-batches, and all others to the first micro-batch of rank 0."""
    slots = micro_batches * ranks
    ones = min(slots - 1, len(numbers) // 2)
    flat = [list(numbers[ones:]), *([] for _ in range(slots - 1 - ones)), *([number] for number in numbers[:ones])]
    return [flat[index * ranks : (index + 1) * ranks] for index in range(micro_batches)]


def token_update(assignment: Assignment, model: str = "a", **more: object) -> list[Operation]:
    """One update over the sequences of ``assignment``, whatever K is."""
    operations: list[Operation] = []
    for index, sequences in enumerate(assignment):
        operations += [
            {"do": "backward_over", "model": model, "sequences": sequences, **more},
            {"do": "step", "model": model, "boundary": index == len(assignment) - 1, "scheduled": True},
        ]
    return operations


def assert_denominators(clause: Clause, execution: Execution) -> None:
    """Require every step that is not refused to report the reference's sum of the denominators, exactly."""
    for index, _, seen in execution.each("step"):
        if all(map(is_error, seen)):
            continue
        expected, reported = execution.predicted()[index]["denominator"], [result["denominator"] for result in seen]
        clause.require(
            reported == [expected] * len(seen),
            f"step (operation {index}): expected the denominator {expected}, got {reported}",
        )


def assert_follows(clause: Clause, execution: Execution, model: str = "a") -> None:
    """Require the last weights of ``model`` to match the reference, after few updates if with bf16."""
    if not execution.program.settings["bf16"]:
        assert_close(clause, execution, model)
        return
    first = execution.program.operations[0]
    start = models.build(first["kind"], first["seed"]).state_dict()
    seen = [seen for _, look, seen in execution.each("weights") if look["model"] == model][-1]
    expected = reference_weights(execution, "per update", model)
    mismatch = tolerances.relative(seen[0], expected, start, tolerances.BF16_FEW_UPDATES)
    clause.require(mismatch is None, f"with bf16, {mismatch}")


@CONTRACT.add
class SumOverSum(Clause):
    """With backward(loss, ..., denominator=n), an update uses the sum of all losses divided by the sum of all
    denominators, over micro-batches and ranks, however the same sequences are distributed over micro-batches and ranks.
    n is a number or a tensor of one number, and may be 0. The result reports the sum of the denominators, exact up to
    2**53."""

    id = "NORM-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        ways = [round_robin(SEQUENCES, 2, target.world), skewed(SEQUENCES, 3, target.world)]
        one = [round_robin(SEQUENCES, 1, target.world), round_robin(SEQUENCES, 4, target.world)]
        exact = [*trained(lr=0.0), *self._sized(target, 2**24), READ_WEIGHTS]
        return [
            *(self._program(target, kind, ways, form) for kind in ("regressor", "language") for form in FORMS),
            self._program(target, "checkpointed", one, "tensor"),
            self._program(target, "language", one, "number", bf16=True),
            program(target, *exact),
            program(target, *trained(seed=5), *self._mixed_updates(target), READ_WEIGHTS, accumulation_steps=2),
        ]

    def _program(
        self, target: Target, kind: str, ways: Sequence[Assignment], form: str, seed: int = 7, bf16: bool = False,
        count: int = 3,
    ) -> Program:  # fmt: skip
        """Train two equal models with ``count`` updates on the same sequences, assigned in two ways."""
        operations: list[Operation] = []
        for model, assignment in zip("ab", ways, strict=True):
            operations += trained(model, kind, seed, schedule=True)
            for _ in range(count):
                operations += token_update(assignment, model, form=form)
            operations.append({"do": "weights", "model": model})
        return program(target, *operations, precision=BF16 if bf16 else FP32, accumulation_steps=2)

    def _sized(self, target: Target, size: int) -> list[Operation]:
        """An update whose denominators add up to an odd number that fp32 does not have."""
        first = [size, *[0] * (target.world - 1)]
        last = [*[0] * (target.world - 1), size + 1]
        sequences = [[rank] for rank in range(target.world)]
        return [
            {"do": "backward_over", "model": "a", "sequences": sequences, "denominators": first},
            {"do": "backward_over", "model": "a", "sequences": sequences, "denominators": last, "form": "tensor"},
            {"do": "step", "model": "a"},
        ]

    def _mixed_updates(self, target: Target) -> list[Operation]:
        """Updates with and without denominators in turn, with two losses in a micro-batch."""
        tokens = token_update(round_robin(SEQUENCES, 2, target.world))
        return [*updates(1, 2), tokens[0], *tokens, *updates(1, 2, first=10, backwards=2), *tokens]

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        numbers = st.lists(st.integers(0, 200), min_size=1, max_size=12)
        assignments = st.builds(
            lambda assign, numbers, micro_batches: assign(numbers, micro_batches, target.world),
            st.sampled_from([round_robin, skewed]), st.shared(numbers, key="sequences"), st.integers(1, 4),
        )  # fmt: skip
        kinds = st.sampled_from(["regressor", "language", "frozen", "unused", "checkpointed"])
        return st.builds(
            lambda kind, one, other, form, seed, count: self._program(target, kind, [one, other], form, seed, count=count),
            kinds, assignments, assignments, st.sampled_from(list(FORMS)), SEEDS, st.integers(1, 3),
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        assert_flags(self, execution, "applied", "skipped")
        assert_denominators(self, execution)
        looks = {operation["model"]: seen for _, operation, seen in execution.each("weights")}
        for model in looks:
            assert_follows(self, execution, model)
        if len(looks) == 2 and not execution.program.settings["bf16"]:
            mismatch = tolerances.absolute(looks["b"][0], looks["a"][0], tolerances.OTHER_SUMMATION_ORDER)
            self.require(mismatch is None, f"the same sequences, assigned in another way: {mismatch}")


@CONTRACT.add
class ZeroDenominator(Clause):
    """A rank or a micro-batch may have no items: n is 0. If the denominators of an update add up to 0, the update is
    skipped on every rank, as for a gradient that is not finite, with grad_norm None and denominator 0. Such an update
    does not count for max_skipped_updates, nor does it reset the count of consecutive updates that are not finite."""

    id = "NORM-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        fp32 = [self._program(target, 1, 0.0), self._program(target, 2, 1.0), self._many(target)]
        return [*fp32, self._program(target, 2, 1.0, bf16=True)]

    def _program(self, target: Target, micro_batches: int, weight: float, seed: int = 4, bf16: bool = False) -> Program:
        """An update in which only the last rank has items, one in which none has, and the next."""
        none: Assignment = [[[] for _ in range(target.world)] for _ in range(micro_batches)]
        some = [[*[[] for _ in range(target.world - 1)], [1, 2]], *none]
        loss = round_robin(SEQUENCES, micro_batches, target.world)
        return program(
            target,
            *trained(seed=seed, schedule=True, weight_decay=0.1),
            *token_update(some),
            READ_STATE,
            *token_update(none if weight == 0 else loss, denominators=[0] * target.world, weight=weight),
            READ_STATE,
            *token_update(loss),
            READ_WEIGHTS,
            precision=BF16 if bf16 else FP32,
            max_skipped_updates=2,
        )

    def _many(self, target: Target) -> Program:
        """Many updates without items; then one that is not finite, and one more of each: the second in a row raises."""
        sequences = [[rank] for rank in range(target.world)]
        empty = token_update([sequences], denominators=[0] * target.world)
        nan = micro_batch(0, poison="nan", scheduled=True)
        operations = [*trained(seed=6, schedule=True), READ_STATE, *4 * empty, *nan, *empty, READ_STATE, *nan]
        operations[-1] = {**operations[-1], "may_fail": True}
        return program(target, *operations, max_skipped_updates=2)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(self._program, st.just(target), st.integers(1, 3), st.sampled_from([0.0, 1.0, -3.0]), SEEDS)

    @override
    def check(self, execution: Execution) -> None:
        before, after = [seen for _, _, seen in execution.each("state")]
        steps = list(execution.each("step"))
        for index, operation, seen in steps:
            for rank, result in enumerate(seen):
                if operation.get("may_fail"):
                    words = ("expected a finite gradient", "2 updates in a row")
                    self.require_error(result, "StrategyError", *words, where=f"rank {rank}, the second NaN in a row")
                    continue
                expected = execution.predicted()[index]
                self.require(
                    all(result[name] == expected[name] for name in ("applied", "skipped", "denominator")),
                    f"rank {rank}, step (operation {index}): expected {show(expected)}, got {show(result)}",
                )
                if expected["denominator"] == 0:
                    norm = result["grad_norm"]
                    self.require(norm is None, f"rank {rank}: expected no norm of an update of 0 items, got {norm}")
        assert_unchanged(self, before, after, "an empty update")
        if not steps[-1][1].get("may_fail"):
            assert_follows(self, execution)


@CONTRACT.add
class InvalidDenominators(Clause):
    """Losses with and without a denominator in one update, and a denominator that is negative or not finite, are
    refused. On a single rank, backward raises. On several ranks, whichever of them made the mistake, optimizer_step
    raises on every rank at the end of the update, so that no rank waits for another; the message names the ranks.
    Weights, state and counters are unchanged, the gradient is cleared, and the next update works. (A tensor on a GPU is
    not read before the end of the update, even on a single rank.)"""

    id = "NORM-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        values: list[float | None] = [-1, float("nan"), float("inf"), None]
        last, all_ranks = [target.world - 1], list(range(target.world))
        programs = [self._program(target, value, last, 1) for value in values]
        programs += [self._program(target, value, all_ranks, 1) for value in values] if target.world > 1 else []
        return [*programs, self._program(target, -2.5, last, 0), self._never(target)]

    def _program(
        self,
        target: Target,
        value: float | None,
        ranks: Sequence[int],
        position: int,
        form: str = "number",
        seed: int = 8,
    ) -> Program:
        """An update of three micro-batches, in which some ranks give ``value`` with one of them."""
        sequences = [[rank, rank + 1] for rank in range(target.world)]
        right: Operation = {"do": "backward_over", "model": "a", "sequences": sequences}
        given = [value if rank in ranks else 2 for rank in range(target.world)]
        wrong: Operation = {**right, "denominators": given, "may_fail": True, "form": form}
        bad: list[Operation] = []
        for index in range(3):
            bad += [wrong if index == position else right, {"do": "step", "model": "a", "boundary": index == 2}]
        bad[-1] = {**bad[-1], "may_fail": True}
        if target.world == 1:  # backward raises, and ends the update
            bad = bad[: 2 * position + 1]
        return self._around(target, bad, seed)

    def _never(self, target: Target) -> Program:
        """One rank gives no denominator in the whole update; a single rank gives them with every other loss."""
        sequences = [[rank, rank + 1] for rank in range(target.world)]
        if target.world == 1:
            return self._program(target, None, [0], 2)
        given = [None if rank == 0 else 2 for rank in range(target.world)]
        alone: Operation = {"do": "backward_over", "model": "a", "sequences": sequences, "denominators": given}
        return self._around(target, [alone, {"do": "step", "model": "a", "boundary": True, "may_fail": True}], 8)

    def _around(self, target: Target, bad: Sequence[Operation], seed: int) -> Program:
        update = token_update(round_robin(SEQUENCES, 2, target.world))
        start = trained(seed=seed, schedule=True, weight_decay=0.1)
        counted = updates(1, 2, scheduled=True)
        return program(
            target, *start, *update, READ_STATE, *bad, READ_STATE, *counted, *2 * update, READ_WEIGHTS, accumulation_steps=2,
            max_skipped_updates=1,
        )  # fmt: skip

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        ranks = st.sets(st.integers(0, target.world - 1), min_size=1).map(sorted)
        values = st.sampled_from([-1, -0.5, float("nan"), float("inf"), float("-inf"), None])
        forms = st.sampled_from(["number", "float", "vector on the host"] if target.world == 1 else list(FORMS))
        return st.builds(
            lambda value, ranks, position, form, seed: self._program(
                target, value, ranks, position if target.world > 1 or value is not None else 1, form, seed
            ),
            values, ranks, st.integers(0, 2), forms, SEEDS,
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        world = execution.target.world
        for index, operation in enumerate(execution.program.operations):
            if operation.get("may_fail") and (operation["do"] == "step" or world == 1):
                for rank in range(world):
                    self._check_error(execution, index, rank)
        before, after = [seen for _, _, seen in execution.each("state")]
        assert_unchanged(self, before, after, "a refused update")
        applied = [step for step in execution.each("step") if not step[1].get("may_fail")]
        for index, _, seen in applied:
            expected = execution.predicted()[index]["applied"]
            self.require(
                all(result["applied"] is expected for result in seen),
                f"step (operation {index}): expected applied={expected}, got {show(list(seen))}",
            )
        assert_close(self, execution)

    def _check_error(self, execution: Execution, index: int, rank: int) -> None:
        given = next(
            operation["denominators"] for operation in execution.program.operations if "denominators" in operation
        )
        wrong = [number for number, value in enumerate(given) if value != 2]
        mixed = given[wrong[0]] is None
        words = ["without" if mixed else f"{given[wrong[0]]:g}"]
        names = [f"rank {number}" for number in wrong] if execution.target.world > 1 else []
        error = "StrategyError" if mixed else "ArgumentError"
        self.require_error(execution.at(rank, index), error, "denominator", *words, *names, where=f"rank {rank}")


@CONTRACT.add
class NormalizedClipping(Clause):
    """Clipping and the reported norm use the gradient after it was divided by the sum of the denominators, even if an
    explicit boundary ends the update."""

    id = "NORM-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, lengths, norm) for lengths in ([2, 1, 3], [1, 4]) for norm in (0.05, 0.6, None)]

    def _program(self, target: Target, lengths: Sequence[int], max_norm: float | None, seed: int = 5) -> Program:
        operations = trained(seed=seed, weight_decay=0.1)
        for number, length in enumerate(lengths):
            sequences = range(number, number + (2 if number % 2 else 9))  # sums of different sizes, which Adam can tell
            operations += token_update(round_robin(sequences, length, target.world))
        return program(target, *operations, READ_WEIGHTS, accumulation_steps=2, max_norm=max_norm)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        lengths, norms = st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from([None, 0.5, 0.05])
        return st.builds(self._program, st.just(target), lengths, norms, SEEDS)

    @override
    def check(self, execution: Execution) -> None:
        assert_flags(self, execution, "applied")
        assert_norms(self, execution)
        assert_close(self, execution)
