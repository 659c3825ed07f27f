"""OPT: schedules, weight decay, averages, live hyperparameters."""

import math
from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, same
from lightrft.conformance.contract import compare
from lightrft.conformance.contract.drawing import BF16, FP32, SEEDS, geometry, micro_batch, trained, updates
from lightrft.conformance.contract.near import LOOK, STATE, astray, close, near


@CONTRACT.add
class Schedule(Clause):
    """The scheduler moves once per applied update; scheduler=None is fine everywhere."""

    id = "OPT-6"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            self._program(place, scheduled, poisoned)
            for scheduled, poisoned in [([True, False, True], ()), ([True, False, True], (1,)), ([True] * 5, (1, 2, 3))]
        ]

    def _program(self, place: Place, scheduled: Sequence[bool], poisoned: Sequence[int]) -> Program:
        operations = trained(schedule=True, lr=1e-3)
        for number, pass_it in enumerate(scheduled):
            spoilt = {"poison": "nan"} if number in poisoned else {}
            operations += [*updates(1, 2, first=10 * number, scheduled=pass_it, **spoilt), STATE]
        return Program(
            operations=(*operations, LOOK), settings={**FP32, "max_skipped_updates": 0, **geometry(place, 2)}
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        turns = st.lists(st.booleans(), min_size=1, max_size=4)
        return turns.flatmap(
            lambda found: st.builds(
                lambda bad: self._program(place, found, bad), st.lists(st.integers(0, len(found) - 1), max_size=2)
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
    change, also where they are frozen between updates, which a strategy may refuse; a trainable parameter that got no
    gradient in an update on every rank counts as having a zero gradient."""

    id = "OPT-7"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            *(self._program(place, kind) for kind in ("regressor", "frozen", "unused")),
            self._program(place, "frozen", by_hand=True),
            self._frozen_later(place),
        ]

    def _frozen_later(self, place: Place) -> Program:
        freeze: Operation = {"do": "freeze", "model": "a", "part": "blocks.0"}
        more = [{**it, "may_fail": True} for it in updates(1, first=20)]
        operations = (*trained(seed=8, weight_decay=10.0), *updates(2), LOOK, freeze, *more, LOOK)
        return Program(operations=operations, settings={**FP32, **geometry(place)})

    def _program(
        self, place: Place, kind: str, seed: int = 8, weight_decay: float = 10.0, wrap_first: bool = False,
        by_hand: bool = False,
    ) -> Program:  # fmt: skip
        """``by_hand``: with an optimizer that was given all parameters, frozen ones too, to decay alike."""
        begun = trained(kind=kind, seed=seed, weight_decay=weight_decay, wrap_first=wrap_first)
        begun = [{**it, "by_hand": by_hand} if it["do"] == "optimizer" else it for it in begun]
        operations = [*begun, *updates(3), LOOK]
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
        if not list(trial.each("freeze")):
            near(self, trial)
            return
        before, after = [seen for _, _, seen in trial.each("weights")]
        for rank, said in enumerate(trial.last("step")):
            refused = is_error(said)
            if refused:
                self.require_error(
                    said, "StrategyError", "frozen", where=f"rank {rank}, parameters frozen between updates"
                )
            for name, tensor in after[rank].items():
                stays = refused or name.startswith("blocks.0.")
                self.require(
                    same(tensor, before[rank][name]) == stays,
                    f"rank {rank}: {name} {'changed after it was frozen' if stays else 'did not move'}",
                )


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
                close(seen[0]["grad_norm"], expected),
                f"step {index}: gradient norm {seen[0]['grad_norm']}, wanted {expected}",
            )


@CONTRACT.add
class LiveRates(Clause):
    """Hyperparameters in the optimizer's param_groups stay live: what a script writes there, the next update uses."""

    id = "PREP-9"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        changes: list[Operation] = [
            {"do": "set_rate", "model": "a", "lr": 1e-2},
            {"do": "set_decay", "model": "a", "weight_decay": 5.0},
            {"do": "set_betas", "model": "a", "betas": [0.1, 0.5]},
        ]
        return [
            Program(
                operations=(*trained(), *updates(1), change, *updates(2, first=5), LOOK),
                settings={**FP32, **geometry(place)},
            )
            for change in changes
        ]

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)


@CONTRACT.add
class OwnSettings(Clause):
    """create_optimizer makes AdamW as it is asked to: with the rate, betas, eps and weight decay that it is given."""

    id = "OPT-20"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, betas=[0.5, 0.6]), self._program(place, eps=1e-2)]

    def _program(self, place: Place, **given: object) -> Program:
        build, optimizer, prepare = trained(seed=13, weight_decay=1.0)
        operations = (build, {**optimizer, **given}, prepare, *updates(4), LOOK)
        return Program(operations=operations, settings={**FP32, **geometry(place)})

    @override
    def check(self, trial: Trial) -> None:
        near(self, trial)


@CONTRACT.add
class Averages(Clause):
    """moving_average moves the average once for each applied update, as the reference does, and nothing else. A model may
    have several averages; with bf16, too, they are kept in the type that they have."""

    id = "OPT-19"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        found = [self._program(place, 0.9, [None, None]), self._program(place, 0.5, [None, "nan", None])]
        return [*found, self._half(place)]

    def _half(self, place: Place) -> Program:
        """With bf16, where the weights are not the reference's to the last bit."""
        average: Operation = {"do": "average", "model": "a", "into": "ema", "beta": 0.75}
        operations = (
            *trained(seed=2),
            *self._copy("ema", "regressor"),
            *updates(1),
            LOOK,
            average,
            LOOK,
            self.look("ema"),
        )
        return Program(operations=operations, settings={**BF16, **geometry(place)})

    def _copy(self, name: str, kind: str) -> list[Operation]:
        return [{"do": "build", "model": name, "kind": kind, "seed": 2}, {"do": "prepare_inference", "model": name}]

    @staticmethod
    def look(model: str) -> Operation:
        """The weights of a model."""
        return {"do": "weights", "model": model}

    def _program(self, place: Place, beta: float, poisons: Sequence[str | None], kind: str = "frozen") -> Program:
        operations = [*trained(kind=kind, seed=2), *self._copy("ema", kind), *self._copy("slow", kind)]
        for number, poison in enumerate(poisons):
            for index in range(2):
                operations += micro_batch(10 * number + index, poison=poison if index else None)
                operations.append({"do": "average", "model": "a", "into": "ema", "beta": beta})
                operations.append({"do": "average", "model": "a", "into": "slow", "beta": 0.8})
        operations += [LOOK, self.look("ema"), self.look("slow")]
        return Program(operations=tuple(operations), settings={**FP32, **geometry(place, 2)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        poisons = st.lists(st.sampled_from([None, None, "nan"]), min_size=1, max_size=4)
        kinds = st.sampled_from(["regressor", "frozen", "language"])
        betas = st.sampled_from([0.0, 0.5, 0.992])
        return st.builds(lambda beta, found, kind: self._program(place, beta, found, kind), betas, poisons, kinds)

    @override
    def check(self, trial: Trial) -> None:
        if trial.program.settings["bf16"]:
            self._check_half(trial)
            return
        for index, operation, seen in trial.each("weights"):
            for rank, weights in enumerate(seen):
                fault = astray(trial, index, weights)
                self.require(fault is None, f"rank {rank}, {operation['model']}: {fault}")

    def _check_half(self, trial: Trial) -> None:
        begun = dict(models.build("regressor", 2).named_parameters())
        for rank, (before, after, average) in enumerate(
            zip(*(seen for _, _, seen in trial.each("weights")), strict=True)
        ):
            wanted = {name: 0.75 * begun[name].detach() + 0.25 * it for name, it in before.items()}
            fault = compare.absolute(average, wanted)
            self.require(fault is None, f"rank {rank}, the average in bf16: {fault}")
            fault = compare.bitwise(after, before)
            self.require(fault is None, f"rank {rank}: averaging changed the model: {fault}")
