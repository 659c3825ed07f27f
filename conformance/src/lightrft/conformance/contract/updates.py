"""OPT: accumulation, clipping, several models."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, show
from lightrft.conformance.contract.drawing import FP32, SEEDS, geometry, micro_batch, trained, updates
from lightrft.conformance.contract.near import LOOK, STATE, astray, close, near


@CONTRACT.add
class Accumulation(Clause):
    """K calls of optimizer_step make exactly one update, at the K-th; before it no parameter, optimizer state or
    schedule has moved. Between two of them backward may be called any number of times, and the gradients add."""

    id = "OPT-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, window, backwards) for window, backwards in [(3, 1), (2, 2), (1, 3)]]

    def _program(self, place: Place, window: int, backwards: int, seed: int = 1) -> Program:
        operations = [*trained(seed=seed, schedule=True), *updates(1, window, scheduled=True), STATE]
        for index in range(2 * window):
            operations += [*micro_batch(10 + index, backwards=backwards, scheduled=True), STATE]
        return Program(operations=(*operations, LOOK), settings={**FP32, **geometry(place, window)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(lambda k, b, s: self._program(place, k, b, s), st.integers(1, 4), st.integers(1, 3), SEEDS)

    @override
    def check(self, trial: Trial) -> None:
        for rank in range(trial.place.world):
            before = None
            for index, operation in enumerate(trial.program.operations):
                if operation["do"] != "state":
                    continue
                after = trial.at(rank, index)
                if before is not None:
                    self._check_moved(before, after, said=trial.at(rank, index - 1))
                before = after
        for index, _, seen in trial.each("step"):
            applied = trial.predicted()[index]["applied"]
            self.require(
                all(it["applied"] == applied for it in seen),
                f"step (operation {index}) applied: {show(seen)}; wanted {applied}",
            )
        near(self, trial)

    def _check_moved(self, before: dict[str, Any], after: dict[str, Any], said: dict[str, Any]) -> None:
        for part in ("parameters", "optimizer", "schedule"):
            moved = before[part] != after[part]
            self.require(
                moved == said["applied"],
                f"{part} {'moved' if moved else 'did not move'} in a step that was {'' if said['applied'] else 'not '}applied",
            )


@CONTRACT.add
class KeptGraph(Clause):
    """backward(loss, ..., retain_graph=True) keeps the graph, so that another loss of the same forward may follow, and the
    gradients of both add."""

    id = "OPT-21"
    level = "SHOULD"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        twice: Operation = {"do": "backward_twice", "model": "a", "batch": 3}
        operations = (*trained(), twice, {"do": "step", "model": "a"}, *updates(1, first=9), LOOK)
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)


@CONTRACT.add
class Boundary(Clause):
    """optimizer_step(..., boundary=True or False) overrides the count, and the update is made from the mean over the
    micro-batches that there were."""

    id = "OPT-13"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, lengths) for lengths in ([1, 3, 2], [2, 5], [4, 1])]

    def _program(self, place: Place, lengths: Sequence[int], seed: int = 1) -> Program:
        operations, batch = trained(seed=seed), 0
        for length in lengths:
            for index in range(length):
                operations += micro_batch(batch)
                operations[-1] = {**operations[-1], "boundary": index == length - 1}
                batch += 1
        return Program(operations=(*operations, LOOK), settings={**FP32, **geometry(place, 3)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        lengths = st.lists(st.integers(1, 5), min_size=1, max_size=3)
        return st.builds(lambda found, seed: self._program(place, found, seed), lengths, SEEDS)

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("step"):
            self.require(
                all(it["applied"] == operation["boundary"] for it in seen),
                f"step {index} with boundary={operation['boundary']}: {show(seen)}",
            )
        near(self, trial)


@CONTRACT.add
class MeanOfLosses(Clause):
    """The gradient applied is that of the mean of the K x world losses as they were given: the same for every K, world
    size and strategy. backward leaves the loss itself as it was."""

    id = "OPT-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, window) for window in (1, 2, 4)]

    def _program(self, place: Place, window: int, seed: int = 3, kind: str = "regressor") -> Program:
        operations = (*trained(seed=seed, kind=kind), *updates(2, window), LOOK)
        return Program(operations=operations, settings={**FP32, **geometry(place, window)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        kinds = st.sampled_from(["regressor", "language"])
        return st.builds(lambda k, s, kind: self._program(place, k, s, kind), st.integers(1, 4), SEEDS, kinds)

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)
        for index, _, losses in trial.each("backward"):
            for rank, (found, given) in enumerate(zip(losses, trial.predicted()[index], strict=True)):
                self.require(
                    close(found, given, 1e-3), f"rank {rank}: after backward the loss is {found}, and was {given}"
                )
        for index, _, seen in trial.each("step"):
            expected = trial.predicted()[index]["grad_norm"]
            if expected is not None:
                self.require(
                    close(seen[0]["grad_norm"], expected),
                    f"step {index}: gradient norm {seen[0]['grad_norm']}, wanted {expected}",
                )


@CONTRACT.add
class Clipping(Clause):
    """Clipping uses one global norm over all trainable parameters of that model, across groups, meshes and ranks; the
    reported pre-clip norm is the reference's."""

    id = "OPT-3"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, norm) for norm in (0.05, 1.0, 1e-3)]

    def _program(self, place: Place, max_norm: float, seed: int = 5, window: int = 1) -> Program:
        operations = (*trained(seed=seed, weight_decay=0.1), *updates(3, window), LOOK)
        return Program(operations=operations, settings={**FP32, "max_norm": max_norm, **geometry(place, window)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        norms = st.floats(1e-3, 5.0).map(lambda norm: round(norm, 4))
        return st.builds(lambda norm, seed, k: self._program(place, norm, seed, k), norms, SEEDS, st.integers(1, 2))

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)
        self.require_alike(trial, "step")
        for index, _, seen in trial.each("step"):
            expected = trial.predicted()[index]["grad_norm"]
            if expected is not None:
                self.require(
                    close(seen[0]["grad_norm"], expected),
                    f"step {index}: gradient norm {seen[0]['grad_norm']}, wanted {expected}",
                )


@CONTRACT.add
class NoClipping(Clause):
    """max_norm None or 0 means no clipping, and never zeroed gradients."""

    id = "OPT-14"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = (*trained(seed=6), *updates(2), LOOK)
        return [
            Program(operations=operations, settings={**FP32, "max_norm": value, **geometry(place)})
            for value in (None, 0.0)
        ]

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)


@CONTRACT.add
class Apart(Clause):
    """Two models trained by one strategy share nothing: counters, norms, clipping, skips, schedules."""

    id = "OPT-4"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        turns: list[tuple[str, str | None]] = [("ab"[number % 2], None) for number in range(16)]
        turns[4:4] = [("a", None), ("b", "nan"), ("a", None), ("b", None), ("b", None)]
        return [self._program(place, turns)]

    def _program(self, place: Place, turns: Sequence[tuple[str, str | None]], max_norm: float = 0.2) -> Program:
        operations = [*trained("a", seed=1, schedule=True), *trained("b", "language", seed=2, schedule=True, lr=3e-4)]
        for batch, (model, poison) in enumerate(turns):
            operations += micro_batch(batch, model, scheduled=True, poison=poison, poisoned_rank=place.world - 1)
        operations += [LOOK, {"do": "weights", "model": "b"}]
        settings = {**FP32, "max_norm": max_norm, "max_skipped_updates": 0, **geometry(place, 2)}
        return Program(operations=tuple(operations), settings=settings)

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        turn = st.tuples(st.sampled_from("ab"), st.sampled_from([None, None, None, "nan"]))
        return st.lists(turn, min_size=2, max_size=8).map(lambda turns: self._program(place, turns))

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("step"):
            expected = trial.predicted()[index]
            for key in ("applied", "skipped"):
                self.require(
                    all(it[key] == expected[key] for it in seen),
                    f"step {index} of {operation['model']}: {key} is {[it[key] for it in seen]}, wanted {expected[key]}",
                )
        for index, operation, seen in trial.each("weights"):
            fault = astray(trial, index, seen[0])
            self.require(fault is None, f"model {operation['model']} was not trained as if it were alone: {fault}")


@CONTRACT.add
class NoLeak(Clause):
    """After an update no old gradient leaks into the next one."""

    id = "OPT-9"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = [*trained(seed=11), *micro_batch(0, weight=1.0)]
        operations[-2] = {**operations[-2], "weight": 1e4}  # a gradient that would drown the next ones
        operations += [*updates(2, first=1), LOOK]
        return [Program(operations=tuple(operations), settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)
