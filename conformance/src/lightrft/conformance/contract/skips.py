"""OPT: non-finite gradients."""

import math
from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Program, Record, Settings, Target, is_error, show
from lightrft.conformance.contract import offloading, tolerances
from lightrft.conformance.contract.offloading import OFFLOAD, RELOAD
from lightrft.conformance.contract.program_parts import (
    BF16,
    FP32,
    SEEDS,
    geometry,
    micro_batch,
    program,
    trained,
    updates,
)
from lightrft.conformance.contract.reference_checks import (
    READ_STATE,
    READ_WEIGHTS,
    assert_close,
    assert_flags,
    reference_weights,
)


@CONTRACT.add
class Skips(Clause):
    """A non-finite gradient or gradient norm on any rank skips the update on every rank, for every precision and
    sharding. Parameters, optimizer state, scheduler and step counter are unchanged bit for bit, gradients are cleared,
    and the result reports the skip. The next finite update is the same as if the skipped one had not happened."""

    id = "OPT-5"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        last = target.world - 1
        return [
            self._program(target, "nan", last, 1, 0, FP32),
            self._program(target, "inf", 0, 2, 1, FP32),
            self._program(target, "huge", last, 1, 0, FP32),
            self._program(target, "nan", 0, 1, 0, BF16),
            self._program(target, "-inf", last, 3, 2, {**FP32, "max_norm": 1.0}),
            *(
                self._program(target, poison, last, 1, 0, FP32, kind="overflowing gradient")
                for poison in ("to -inf", "to inf")
            ),
        ]

    def _program(
        self,
        target: Target,
        poison: str,
        rank: int,
        accumulation_steps: int,
        position: int,
        precision: Settings,
        seed: int = 4,
        kind: str = "regressor",
    ) -> Program:
        operations = [
            *trained(kind=kind, seed=seed, schedule=True, weight_decay=0.1),
            *updates(1, accumulation_steps, scheduled=True),
            READ_STATE,
        ]
        for index in range(accumulation_steps):
            poisoned: Record = {"poison": poison, "poisoned_rank": rank} if index == position else {}
            operations += micro_batch(50 + index, scheduled=True, **poisoned)
        operations += [READ_STATE, *updates(2, accumulation_steps, first=90, scheduled=True), READ_WEIGHTS]
        return program(target, *operations, precision=precision, accumulation_steps=accumulation_steps)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.integers(1, 3).flatmap(
            lambda accumulation_steps: st.builds(
                lambda poison, rank, position, precision, seed: self._program(
                    target, poison, rank, accumulation_steps, position, precision, seed
                ),
                st.sampled_from(["nan", "inf", "-inf", "huge"]),
                st.integers(0, target.world - 1),
                st.integers(0, accumulation_steps - 1),
                st.sampled_from([FP32, {**FP32, "max_norm": 0.5}, BF16]),
                SEEDS,
            )
        )

    @override
    def check(self, execution: Execution) -> None:
        before, after = [seen for _, _, seen in execution.each("state")]
        skipped = [index for index, _, _ in execution.each("step") if execution.predicted()[index]["skipped"]]
        self.require(len(skipped) == 1, "the reference skips one update")
        for rank in range(execution.target.world):
            reported = execution.at(rank, skipped[0])
            self.require(
                reported["skipped"] is True and reported["applied"] is False,
                f"rank {rank}: expected the update to be skipped, got {show(reported)}",
            )
            self.require(
                reported["grad_norm"] is not None and not math.isfinite(reported["grad_norm"]),
                f"rank {rank}: expected a non-finite norm of the skipped update, got {reported['grad_norm']}",
            )
            for part in ("parameters", "optimizer", "rates", "schedule"):
                self.require_same(
                    before[rank][part], after[rank][part], f"rank {rank}: {part} changed in a skipped update"
                )
        assert_flags(self, execution, "applied")
        if execution.program.settings["bf16"]:
            start = models.build("regressor", execution.program.operations[0]["seed"]).state_dict()
            mismatch = tolerances.relative(
                execution.last("weights")[0],
                reference_weights(execution, "per update"),
                start,
                tolerances.BF16_FEW_UPDATES,
            )
            self.require(mismatch is None, f"after the skip, {mismatch}")
        else:
            assert_close(self, execution)


@CONTRACT.add
class TooManySkips(Clause):
    """Reaching max_skipped_updates consecutive skipped updates raises on every rank; 0 disables this. An applied update
    resets the count."""

    id = "OPT-15"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        two, third = [*micro_batch(0, poison="nan"), *micro_batch(1, poison="nan")], micro_batch(2, poison="nan")
        third[-1] = {**third[-1], "may_fail": True}
        endless = [operation for batch in range(4) for operation in micro_batch(batch, poison="inf")]
        three: Record = {**FP32, "max_skipped_updates": 3, **geometry(target)}
        both = (*trained(), *trained("b", seed=2), *two, *micro_batch(4, "b"), *third)
        early = micro_batch(3)
        early[-1] = {**early[-1], "boundary": True}
        return [
            Program(operations=both, settings=three),
            Program(operations=(*trained(), *two, *micro_batch(3), *two, *third), settings=three),
            Program(operations=(*trained(), *two, *early, *two, *third), settings=three),
            Program(operations=(*trained(), *endless), settings={**three, "max_skipped_updates": 0}),
            Program(
                operations=(*trained(), *two, *OFFLOAD, *RELOAD, *third),
                settings={**offloading.settings(target), **three},
            ),
        ]

    @override
    def check(self, execution: Execution) -> None:
        steps = list(execution.each("step"))
        for index, _, seen in steps[:-1]:
            for observed in seen:
                self.require(not is_error(observed), f"step (operation {index}) raised {show(observed)}")
        for rank, observed in enumerate(steps[-1][2]):
            if execution.program.settings["max_skipped_updates"]:
                self.require_error(observed, "StrategyError", "3", where=f"rank {rank}, the third skip in a row")
            else:
                self.require(
                    not is_error(observed) and observed["skipped"],
                    f"rank {rank}: max_skipped_updates=0: expected a skipped update, got {show(observed)}",
                )
