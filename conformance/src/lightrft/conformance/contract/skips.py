"""OPT: gradients that are not finite."""

import math
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Place, Program, Trial, is_error, show
from lightrft.conformance.contract import compare, offloading
from lightrft.conformance.contract.drawing import BF16, FP32, SEEDS, geometry, micro_batch, trained, updates
from lightrft.conformance.contract.near import LOOK, STATE, near, reference_weights
from lightrft.conformance.contract.offloading import BACK, OUT


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
            spoilt: dict[str, Any] = {"poison": poison, "poisoned_rank": rank} if index == position else {}
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
            fault = compare.relative(
                trial.last("weights")[0], reference_weights(trial, "once"), start, compare.BF16_FEW_UPDATES
            )
            self.require(fault is None, f"after the skip: {fault}")
        else:
            near(self, trial)


@CONTRACT.add
class TooManySkips(Clause):
    """A configurable run of consecutive skips raises, on every rank; a finite update in between begins a new run."""

    id = "OPT-15"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        two, third = [*micro_batch(0, poison="nan"), *micro_batch(1, poison="nan")], micro_batch(2, poison="nan")
        third[-1] = {**third[-1], "may_fail": True}
        endless = [it for batch in range(4) for it in micro_batch(batch, poison="inf")]
        three: dict[str, Any] = {**FP32, "max_skipped_updates": 3, **geometry(place)}
        return [
            Program(operations=(*trained(), *two, *micro_batch(3), *two, *third), settings=three),
            Program(operations=(*trained(), *endless), settings={**three, "max_skipped_updates": 0}),
            Program(
                operations=(*trained(), *two, *OUT, *BACK, *third), settings={**offloading.settings(place), **three}
            ),
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
