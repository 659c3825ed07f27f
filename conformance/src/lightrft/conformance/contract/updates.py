"""OPT: gradient accumulation, clipping, several models."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Record, Target, difference
from lightrft.conformance.contract.program_parts import SEEDS, micro_batch, program, trained, updates
from lightrft.conformance.contract.reference_checks import (
    READ_STATE,
    READ_WEIGHTS,
    FollowsReference,
    assert_close,
    assert_flags,
    assert_norms,
    close,
    first_mismatch,
)


@CONTRACT.add
class Accumulation(Clause):
    """K calls of optimizer_step make exactly one update, at the K-th call. Before it, no parameter, optimizer state or
    scheduler changes. backward may be called any number of times between two calls, and the gradients add up."""

    id = "OPT-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, accumulation_steps, backwards)
            for accumulation_steps, backwards in [(3, 1), (2, 2), (1, 3)]
        ]

    def _program(self, target: Target, accumulation_steps: int, backwards: int, seed: int = 1) -> Program:
        operations = [*trained(seed=seed, schedule=True), *updates(1, accumulation_steps, scheduled=True), READ_STATE]
        for index in range(2 * accumulation_steps):
            operations += [*micro_batch(10 + index, backwards=backwards, scheduled=True), READ_STATE]
        return program(target, *operations, READ_WEIGHTS, accumulation_steps=accumulation_steps)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(lambda k, b, s: self._program(target, k, b, s), st.integers(1, 4), st.integers(1, 3), SEEDS)

    @override
    def check(self, execution: Execution) -> None:
        for rank in range(execution.target.world):
            before = None
            for index, operation in enumerate(execution.program.operations):
                if operation["do"] != "state":
                    continue
                after = execution.at(rank, index)
                if before is not None:
                    self._check_moved(before, after, reported=execution.at(rank, index - 1))
                before = after
        assert_flags(self, execution, "applied")
        assert_close(self, execution)

    def _check_moved(self, before: Record, after: Record, reported: Record) -> None:
        for part in ("parameters", "optimizer", "schedule"):
            change = difference(before[part], after[part])
            self.require(
                (change is not None) == reported["applied"],
                f"{part} {'changed' if change else 'did not change'} in a step with applied={reported['applied']}"
                + (f": {change}" if change else ""),
            )


@CONTRACT.add
class KeptGraph(FollowsReference):
    """backward(loss, ..., retain_graph=True) keeps the graph, so that another loss of the same forward can follow. The
    gradients of both add up."""

    id = "OPT-21"
    level = "SHOULD"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        twice: Operation = {"do": "backward_twice", "model": "a", "batch": 3}
        return [program(target, *trained(), twice, {"do": "step", "model": "a"}, *updates(1, first=9), READ_WEIGHTS)]


@CONTRACT.add
class Boundary(Clause):
    """optimizer_step(..., boundary=True or False) overrides the count. The update uses the mean over the micro-batches
    since the last update, and the reported norm and clipping are those of that mean."""

    id = "OPT-13"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [self._program(target, lengths) for lengths in ([1, 3, 2], [2, 5], [4, 1])]
        return [
            *programs,
            self._program(target, [1, 2, 4], max_norm=0.5),
            self._program(target, [2, 1, 4], backwards=2),
        ]

    def _program(
        self, target: Target, lengths: Sequence[int], seed: int = 1, max_norm: float | None = None, backwards: int = 1
    ) -> Program:
        operations, batch = trained(seed=seed), 0
        for length in lengths:
            for index in range(length):
                operations += micro_batch(batch, backwards=backwards)
                operations[-1] = {**operations[-1], "boundary": index == length - 1}
                batch += 1
        return program(target, *operations, READ_WEIGHTS, accumulation_steps=3, max_norm=max_norm)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        lengths, norms = st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from([None, 0.5, 0.05])
        return st.builds(self._program, st.just(target), lengths, SEEDS, norms, st.integers(1, 2))

    @override
    def check(self, execution: Execution) -> None:
        assert_flags(self, execution, "applied")
        assert_norms(self, execution)
        assert_close(self, execution)


@CONTRACT.add
class MeanOfLosses(Clause):
    """Without denominators, the update uses the gradient of the mean of all K x world_size losses, for every K, world
    size and strategy. backward does not change the loss."""

    id = "OPT-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, accumulation_steps) for accumulation_steps in (1, 2, 4, 7)]

    def _program(self, target: Target, accumulation_steps: int, seed: int = 3, kind: str = "regressor") -> Program:
        return program(
            target,
            *trained(seed=seed, kind=kind),
            *updates(2, accumulation_steps),
            READ_WEIGHTS,
            accumulation_steps=accumulation_steps,
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda k, s, kind: self._program(target, k, s, kind),
            st.integers(1, 8),
            SEEDS,
            st.sampled_from(["regressor", "language"]),
        )

    @override
    def check(self, execution: Execution) -> None:
        assert_close(self, execution)
        for index, _, losses in execution.each("backward"):
            for rank, (loss, given) in enumerate(zip(losses, execution.predicted()[index], strict=True)):
                self.require(
                    close(loss, given, 1e-3), f"rank {rank}: after backward, expected the loss {given}, got {loss}"
                )
        assert_norms(self, execution)


@CONTRACT.add
class Clipping(Clause):
    """Clipping uses one global norm over all trainable parameters of a model, across parameter groups, meshes and
    ranks. The reported norm, before clipping, equals the reference's."""

    id = "OPT-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, norm) for norm in (0.05, 1.0, 1e-3)]

    def _program(self, target: Target, max_norm: float, seed: int = 5, accumulation_steps: int = 1) -> Program:
        return program(
            target,
            *trained(seed=seed, weight_decay=0.1),
            *updates(3, accumulation_steps),
            READ_WEIGHTS,
            accumulation_steps=accumulation_steps,
            max_norm=max_norm,
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        norms = st.floats(1e-3, 5.0).map(lambda norm: round(norm, 4))
        return st.builds(lambda norm, seed, k: self._program(target, norm, seed, k), norms, SEEDS, st.integers(1, 2))

    @override
    def check(self, execution: Execution) -> None:
        assert_close(self, execution)
        self.require_same_on_all_ranks(execution, "step")
        assert_norms(self, execution)


@CONTRACT.add
class NoClipping(FollowsReference):
    """max_norm=None and max_norm=0 disable clipping and never zero the gradients."""

    id = "OPT-14"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        operations = (*trained(seed=6), *updates(2), READ_WEIGHTS)
        return [program(target, *operations, max_norm=value) for value in (None, 0.0)]


@CONTRACT.add
class IndependentModels(Clause):
    """Two models trained by one strategy are independent: counters, norms, clipping, skips and schedulers."""

    id = "OPT-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        turns: list[tuple[str, str | None]] = [("ab"[number % 2], None) for number in range(16)]
        turns[4:4] = [("a", None), ("b", "nan"), ("a", None), ("b", None), ("b", None)]
        return [self._program(target, turns)]

    def _program(self, target: Target, turns: Sequence[tuple[str, str | None]], max_norm: float = 0.2) -> Program:
        operations = [*trained("a", seed=1, schedule=True), *trained("b", "language", seed=2, schedule=True, lr=3e-4)]
        for batch, (model, poison) in enumerate(turns):
            operations += micro_batch(batch, model, scheduled=True, poison=poison, poisoned_rank=target.world - 1)
        operations += [READ_WEIGHTS, {"do": "weights", "model": "b"}]
        return program(target, *operations, accumulation_steps=2, max_norm=max_norm, max_skipped_updates=0)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        turn = st.tuples(st.sampled_from("ab"), st.sampled_from([None, None, None, "nan"]))
        return st.lists(turn, min_size=2, max_size=8).map(lambda turns: self._program(target, turns))

    @override
    def check(self, execution: Execution) -> None:
        assert_flags(self, execution, "applied", "skipped")
        for index, operation, seen in execution.each("weights"):
            mismatch = first_mismatch(execution, index, seen[0])
            self.require(mismatch is None, f"model {operation['model']} differs from one trained alone: {mismatch}")


@CONTRACT.add
class NoLeak(FollowsReference):
    """Gradients of one update never leak into the next."""

    id = "OPT-9"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        operations = [*trained(seed=11), *micro_batch(0, weight=1.0)]
        operations[-2] = {**operations[-2], "weight": 1e4}  # a gradient that would dominate the next ones
        operations += [*updates(2, first=1), READ_WEIGHTS]
        return [program(target, *operations)]
