"""OPT: gradients and updates."""

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Place, Program, Trial, is_error, show
from lightrft.conformance.contract import compare
from lightrft.conformance.contract.drawing import BF16, FP32, SEEDS, geometry, micro_batch, trained, training, updates

LOOK = {"do": "weights", "model": "a"}
STATE = {"do": "state", "model": "a"}


def near(clause: Clause, trial: Trial, model: str = "a") -> None:
    """Require the last weights to be the reference's, in one family or the other, within rounding."""
    fits = [compare.absolute(trial.last("weights")[0], _weights(trial, family, model)) for family in ("once", "each")]
    clause.require(None in fits, f"the weights are not those of the reference: {fits[0]}")
    clause.require_alike(trial, "weights")


def _weights(trial: Trial, family: Any, model: str = "a") -> compare.Weights:
    predicted = trial.predicted(family)
    looks = [index for index, operation, _ in trial.each("weights") if operation["model"] == model]
    found: compare.Weights = predicted[looks[-1]]
    return found


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
                seen, said = trial.at(rank, index), trial.at(rank, index - 1) if index else None
                if operation["do"] != "state":
                    continue
                if before is not None:
                    self._check_moved(before, seen, said)
                before = seen
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
    size and strategy."""

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
        for index, _, seen in trial.each("step"):
            expected = trial.predicted()[index]["grad_norm"]
            if expected is not None:
                self.require(
                    _close(seen[0]["grad_norm"], expected),
                    f"step {index}: gradient norm {seen[0]['grad_norm']}, wanted {expected}",
                )


def _close(found: Any, expected: float, bound: float = 1e-5) -> bool:
    return isinstance(found, float) and math.isclose(found, expected, rel_tol=bound, abs_tol=1e-6)


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
                    _close(seen[0]["grad_norm"], expected),
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
            operations += micro_batch(batch, model, scheduled=True, poison=poison)
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
            fits = [compare.absolute(seen[0], trial.predicted(family)[index]) for family in ("once", "each")]  # type: ignore[arg-type]
            self.require(None in fits, f"model {operation['model']} was not trained as if it were alone: {fits[0]}")


@CONTRACT.add
class Skips(Clause):
    """A non-finite gradient, or gradient norm, on any one rank skips the update on every rank, for every precision and
    sharding: parameters, optimizer state, schedule and step counter are unchanged bit for bit, gradients are cleared,
    the result says skipped, and the next finite update is as if the bad one had not been."""

    id = "OPT-5"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        last = place.world - 1
        return [
            self._program(place, "nan", last, 1, 0, FP32),
            self._program(place, "inf", 0, 2, 1, FP32),
            self._program(place, "huge", last, 1, 0, FP32),
            self._program(place, "nan", 0, 1, 0, BF16),
            self._program(place, "-inf", last, 3, 2, {**FP32, "max_norm": 1.0}),
        ]

    def _program(
        self, place: Place, poison: str, rank: int, window: int, position: int, precision: Any, seed: int = 4
    ) -> Program:
        operations = [*trained(seed=seed, schedule=True, weight_decay=0.1), *updates(1, window, scheduled=True), STATE]
        for index in range(window):
            spoilt = {"poison": poison, "poisoned_rank": rank} if index == position else {}
            operations += micro_batch(50 + index, scheduled=True, **spoilt)
        operations += [STATE, *updates(2, window, first=90, scheduled=True), LOOK]
        return Program(operations=tuple(operations), settings={**precision, **geometry(place, window)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.integers(1, 3).flatmap(
            lambda window: st.builds(
                lambda poison, rank, position, precision, seed: self._program(
                    place, poison, rank, window, position, precision, seed
                ),
                st.sampled_from(["nan", "inf", "-inf", "huge"]),
                st.integers(0, place.world - 1),
                st.integers(0, window - 1),
                st.sampled_from([FP32, {**FP32, "max_norm": 0.5}, BF16]),
                SEEDS,
            )
        )

    @override
    def check(self, trial: Trial) -> None:
        before, after = [seen for _, _, seen in trial.each("state")]
        skipped = [index for index, _, _ in trial.each("step") if trial.predicted()[index]["skipped"]]
        self.require(len(skipped) == 1, "the reference skips one update")
        for rank in range(trial.place.world):
            said = trial.at(rank, skipped[0])
            self.require(
                said["skipped"] is True and said["applied"] is False,
                f"rank {rank}: the bad update was not skipped: {show(said)}",
            )
            self.require(
                said["grad_norm"] is not None and not math.isfinite(said["grad_norm"]),
                f"rank {rank}: a skipped update reports the norm {said['grad_norm']}",
            )
            for part in ("parameters", "optimizer", "rates", "schedule"):
                self.require(
                    before[rank][part] == after[rank][part], f"rank {rank}: {part} changed in a skipped update"
                )
        for index, _, seen in trial.each("step"):
            expected = trial.predicted()[index]["applied"]
            self.require(
                all(it["applied"] == expected for it in seen),
                f"step {index}: applied is {[it['applied'] for it in seen]}, wanted {expected}",
            )
        if trial.program.settings["bf16"]:
            start = models.build("regressor", trial.program.operations[0]["seed"]).state_dict()
            fault = compare.relative(trial.last("weights")[0], _weights(trial, "once"), start, compare.BF16_RELATIVE)
            self.require(fault is None, f"after the skip: {fault}")
        else:
            near(self, trial)


@CONTRACT.add
class TooManySkips(Clause):
    """A configurable run of consecutive skips raises, on every rank; a finite update in between begins a new run."""

    id = "OPT-15"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        turns = ["nan", "nan", None, "nan", "nan", "nan"]
        operations = trained()
        for batch, poison in enumerate(turns):
            operations += micro_batch(batch, poison=poison)
        operations[-1] = {**operations[-1], "may_fail": True}
        endless = [*trained(), *[it for batch in range(4) for it in micro_batch(batch, poison="inf")]]
        return [
            Program(operations=tuple(operations), settings={**FP32, "max_skipped_updates": 3, **geometry(place)}),
            Program(operations=tuple(endless), settings={**FP32, "max_skipped_updates": 0, **geometry(place)}),
        ]

    @override
    def check(self, trial: Trial) -> None:
        steps = list(trial.each("step"))
        for index, _, seen in steps[:-1]:
            for observed in seen:
                self.require(not is_error(observed), f"step {index}: raised {show(observed)}")
        for rank, observed in enumerate(steps[-1][2]):
            if trial.program.settings["max_skipped_updates"]:
                self.require_error(observed, "StrategyError", "3", where=f"rank {rank}, the third skip in a row")
            else:
                self.require(
                    not is_error(observed) and observed["skipped"],
                    f"rank {rank}: max_skipped_updates=0 must never raise: {show(observed)}",
                )


@CONTRACT.add
class Schedule(Clause):
    """The scheduler moves once per applied update; scheduler=None is fine everywhere."""

    id = "OPT-6"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, [True, False, True], None), self._program(place, [True, False, True], 1)]

    def _program(self, place: Place, scheduled: Sequence[bool], poisoned: int | None) -> Program:
        operations = trained(schedule=True, lr=1e-3)
        for number, pass_it in enumerate(scheduled):
            spoilt = {"poison": "nan"} if number == poisoned else {}
            operations += [*updates(1, 2, first=10 * number, scheduled=pass_it, **spoilt), STATE]
        return Program(
            operations=(*operations, LOOK), settings={**FP32, "max_skipped_updates": 0, **geometry(place, 2)}
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        turns = st.lists(st.booleans(), min_size=1, max_size=4)
        return turns.flatmap(
            lambda found: st.builds(
                lambda bad: self._program(place, found, bad), st.none() | st.integers(0, len(found) - 1)
            )
        )

    @override
    def check(self, trial: Trial) -> None:
        moved = 0
        for index, operation in enumerate(trial.program.operations):
            if operation["do"] == "step" and operation["scheduled"] and trial.predicted()[index]["applied"]:
                moved += 1
            if operation["do"] == "state":
                for rank in range(trial.place.world):
                    seen = trial.at(rank, index)
                    self.require(
                        seen["schedule"] == moved,
                        f"rank {rank}: the schedule is at {seen['schedule']} after {moved} applied updates",
                    )
                    rate = 1e-3 / (1 + 0.5 * moved)
                    self.require(
                        all(math.isclose(it, rate, rel_tol=1e-9) for it in seen["rates"]),
                        f"rank {rank}: the rate is {seen['rates']}, wanted {rate}",
                    )
        near(self, trial)


@CONTRACT.add
class Decay(Clause):
    """Weight decay spares biases and norms, by names taken before wrapping; parameters with requires_grad=False never
    change; a trainable parameter that got no gradient in an update on every rank counts as having a zero gradient."""

    id = "OPT-7"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, kind) for kind in ("regressor", "frozen", "unused")]

    def _program(
        self, place: Place, kind: str, seed: int = 8, weight_decay: float = 10.0, wrap_first: bool = False
    ) -> Program:
        operations = [
            *trained(kind=kind, seed=seed, weight_decay=weight_decay, wrap_first=wrap_first),
            *updates(3),
            LOOK,
        ]
        return Program(operations=tuple(operations), settings={**FP32, **geometry(place)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        kinds, decays = (
            st.sampled_from(["regressor", "frozen", "unused", "language"]),
            st.sampled_from([0.1, 1.0, 30.0]),
        )
        return st.builds(
            lambda kind, seed, decay, first: self._program(place, kind, seed, decay, first),
            kinds,
            SEEDS,
            decays,
            st.booleans(),
        )

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)


@CONTRACT.add
class UnevenModules(Clause):
    """Ranks may use different modules in one forward: a rank that did not use one counts with a zero gradient."""

    id = "OPT-16"
    smallest_world = 2
    capability = "uneven_modules"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        settings = {**FP32, "timeout": 5.0, **geometry(place)}
        return [Program(operations=(*trained(kind="uneven"), *updates(3), LOOK), settings=settings, seconds=40)]

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)
        for index, _, seen in trial.each("step"):
            expected = trial.predicted()[index]["grad_norm"]
            self.require(
                _close(seen[0]["grad_norm"], expected),
                f"step {index}: gradient norm {seen[0]['grad_norm']}, wanted {expected}",
            )


@CONTRACT.add
class Parity(Clause):
    """Training follows the reference over many updates: bit for bit in fp32 on the CPU with K = 1 and clipping
    inactive, at world sizes 1 and 2; else within rounding."""

    id = "OPT-8"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, kind, 20, 1) for kind in ("regressor", "language")] + [
            self._program(place, "regressor", 10, 3)
        ]

    def _program(self, place: Place, kind: str, count: int, window: int, seed: int = 9) -> Program:
        operations = (*trained(kind=kind, seed=seed), *updates(count, window), LOOK)
        return Program(operations=operations, settings={**FP32, **geometry(place, window)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return training(place, max_norms=st.sampled_from([None, None, 1.0, 0.1]))

    @override
    def check(self, trial: Trial) -> None:
        exact = (
            trial.place.device == "cpu"
            and trial.place.world in (1, 2)
            and trial.program.settings["train_batch_size"] == 2 * trial.place.world
            and not trial.program.settings["max_norm"]
        )
        if exact:
            for rank, seen in enumerate(trial.last("weights")):
                fault = compare.bitwise(seen, _weights(trial, "once"))
                self.require(fault is None, f"rank {rank}: fp32, K = 1, no clipping must be exact, and {fault}")
        else:
            near(self, trial)


@CONTRACT.add
class HalfPrecision(Clause):
    """With bf16, training follows the fp32 reference within a tenth of the update."""

    id = "OPT-17"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            Program(operations=(*trained(kind=kind, seed=9), *updates(20), LOOK), settings={**BF16, **geometry(place)})
            for kind in ("regressor", "language")
        ]

    @override
    def check(self, trial: Trial) -> None:
        first = trial.program.operations[0]
        start = dict(models.build(first["kind"], first["seed"]).named_parameters())
        fault = compare.relative(trial.last("weights")[0], _weights(trial, "once"), start, compare.BF16_RELATIVE)
        self.require(fault is None, f"after 20 updates in bf16 {fault}")
        self.require_alike(trial, "weights")


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


@CONTRACT.add
class MasterWeights(Clause):
    """With bf16 updates accumulate in fp32 master weights: many updates below bf16's resolution still move the model as
    the reference says, also where the model was given in bf16."""

    id = "OPT-10"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, dtype) for dtype in ("float32", "bfloat16")]

    def _program(self, place: Place, dtype: str) -> Program:
        operations = (*trained(seed=12, lr=1e-6, weight_decay=0.0, dtype=dtype), *updates(12), LOOK)
        return Program(operations=operations, settings={**BF16, **geometry(place)})

    @override
    def check(self, trial: Trial) -> None:
        first = trial.program.operations[0]
        start = dict(models.build("regressor", first["seed"]).named_parameters())
        if first["dtype"] == "bfloat16":
            start = {name: parameter.bfloat16().float() for name, parameter in start.items()}
        weights = trial.last("weights")[0]
        reference = _weights(trial, "once")
        for name, begun in dict(models.build("regressor", first["seed"]).named_parameters()).items():
            expected = reference[name] - begun.detach()
            moved = weights[name] - start[name].detach()
            # Adam's step has the size of the rate whatever the gradient is: compare sizes, since bf16 may turn signs.
            sizes = moved.abs().mean().item(), expected.abs().mean().item()
            self.require(
                0.5 * sizes[1] <= sizes[0] <= 1.5 * sizes[1],
                f"{name} moved by {sizes[0]:.3g} on average in 12 updates of 1e-6, wanted {sizes[1]:.3g}",
            )


@CONTRACT.add
class BadLosses(Clause):
    """A loss that is not a scalar, or carries no graph, or an optimizer that belongs to another model, or a model that
    this strategy has not prepared, raises an error that names which."""

    id = "OPT-11"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        bad = [
            {"do": "bad_backward", "model": "a", "what": what, "may_fail": True}
            for what in ("vector", "detached", "number")
        ]
        mixed = {"do": "backward", "model": "a", "batch": 0, "optimizer_of": "b", "may_fail": True}
        mixed_step = {"do": "step", "model": "a", "optimizer_of": "b", "may_fail": True}
        build = {"do": "build", "model": "c", "seed": 4}
        inference = [
            build,
            {"do": "optimizer", "model": "c", "by_hand": True},
            {"do": "prepare_inference", "model": "c"},
        ]
        unused = {"do": "backward", "model": "c", "batch": 0, "may_fail": True}
        operations = (
            *trained("a"),
            *trained("b", seed=2),
            *bad,
            mixed,
            mixed_step,
            *inference,
            unused,
            *updates(2),
            LOOK,
        )
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        words = {"vector": ("loss", "scalar"), "detached": ("loss", "graph"), "number": ("loss",)}
        for rank in range(trial.place.world):
            for index, operation in enumerate(trial.program.operations):
                observed = trial.at(rank, index)
                if operation["do"] == "bad_backward":
                    self.require_error(
                        observed,
                        "LightRFTError",
                        *words[operation["what"]],
                        where=f"rank {rank}, a {operation['what']} loss",
                    )
                elif "optimizer_of" in operation:
                    self.require_error(
                        observed,
                        "StrategyError",
                        "optimizer",
                        where=f"rank {rank}, {operation['do']} with the optimizer of another model",
                    )
                elif operation["do"] == "backward" and operation["model"] == "c":
                    self.require(
                        is_error(observed), f"rank {rank}: backward of a model that is not in training raised nothing"
                    )
        near(self, trial)


@CONTRACT.add
class Adoption(Clause):
    """A strategy that does not replace parameters adopts a bare model and optimizer at first use; another one refuses
    them, and says that the model was not prepared."""

    id = "OPT-18"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        bare = [
            {"do": "build", "model": "a", "seed": 3},
            {"do": "optimizer", "model": "a", "by_hand": True, "weight_decay": 0.0},
        ]
        operations = [*bare, *updates(2), LOOK]
        return [
            Program(
                operations=tuple({**it, "may_fail": True} for it in operations), settings={**FP32, **geometry(place)}
            )
        ]

    @override
    def check(self, trial: Trial) -> None:
        if "adoption" in trial.place.capabilities:
            for _, _, seen in trial.each("step"):
                self.require(not any(map(is_error, seen)), f"a bare model was not adopted: {show(seen)}")
            near(self, trial)
        else:
            for rank, observed in enumerate(list(trial.each("backward"))[0][2]):
                self.require_error(observed, "StrategyError", "prepare", where=f"rank {rank}, backward of a bare model")


@CONTRACT.add
class Result(Clause):
    """optimizer_step returns whether it applied, whether it skipped, and the pre-clip norm."""

    id = "OPT-12"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = [*trained(), *updates(1, 2), *updates(1, 2, first=5, poison="nan"), *updates(1, 2, first=9)]
        return [Program(operations=tuple(operations), settings={**FP32, "max_norm": 0.1, **geometry(place, 2)})]

    @override
    def check(self, trial: Trial) -> None:
        for index, _, seen in trial.each("step"):
            expected = trial.predicted()[index]
            for rank, said in enumerate(seen):
                self.require(
                    (said["applied"], said["skipped"]) == (expected["applied"], expected["skipped"]),
                    f"rank {rank}, step {index}: {show(said)}, wanted {show(expected)}",
                )
                norm = expected["grad_norm"]
                fits = said["grad_norm"] is None if norm is None else _norm_fits(said["grad_norm"], norm)
                self.require(fits, f"rank {rank}, step {index}: the norm is {said['grad_norm']}, wanted {norm}")


def _norm_fits(found: Any, expected: float) -> bool:
    return isinstance(found, float) and (
        _close(found, expected) if math.isfinite(expected) else not math.isfinite(found)
    )


@CONTRACT.add
class Averages(Clause):
    """moving_average moves the average once for each applied update, as the reference does, and nothing else."""

    id = "OPT-19"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, 0.9, [None, None]), self._program(place, 0.5, [None, "nan", None])]

    def _program(self, place: Place, beta: float, poisons: Sequence[str | None], kind: str = "frozen") -> Program:
        copy = [{"do": "build", "model": "ema", "kind": kind, "seed": 2}, {"do": "prepare_inference", "model": "ema"}]
        operations = [*trained(kind=kind, seed=2), *copy]
        for number, poison in enumerate(poisons):
            for index in range(2):
                operations += micro_batch(10 * number + index, poison=poison if index else None)
                operations.append({"do": "average", "model": "a", "into": "ema", "beta": beta})
        operations += [LOOK, {"do": "weights", "model": "ema"}]
        return Program(operations=tuple(operations), settings={**FP32, **geometry(place, 2)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        poisons = st.lists(st.sampled_from([None, None, "nan"]), min_size=1, max_size=4)
        kinds = st.sampled_from(["regressor", "frozen", "language"])
        betas = st.sampled_from([0.0, 0.5, 0.992])
        return st.builds(lambda beta, found, kind: self._program(place, beta, found, kind), betas, poisons, kinds)

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("weights"):
            fits = [compare.absolute(seen[0], trial.predicted(family)[index]) for family in ("once", "each")]  # type: ignore[arg-type]
            self.require(None in fits, f"{operation['model']}: {fits[0]}")


@CONTRACT.add
class LiveRates(Clause):
    """Hyperparameters in the optimizer's param_groups stay live: what a script writes there, the next update uses."""

    id = "PREP-9"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = [*trained(), *updates(1), {"do": "set_rate", "model": "a", "lr": 1e-2}, *updates(1, first=5), LOOK]
        return [Program(operations=tuple(operations), settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)
