"""LOG: metrics, and the trackers that they go to."""

import math
from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target
from lightrft.conformance.contract.denominators import round_robin, token_update
from lightrft.conformance.contract.program_parts import SEEDS, program, trained, updates
from lightrft.conformance.contract.reference_checks import close
from lightrft.conformance.interpreter.tracking import FailingTracker, RecordingTracker

KEEPS, FAILS = (f"{tracker.__module__}:{tracker.__name__}" for tracker in (RecordingTracker, FailingTracker))
SEQUENCES = range(9)
NUMBERS = {"none": 0, "zero": 0.0, "large": 2**53 + 1, "small": -5e-324, "undefined": math.nan, "endless": -math.inf}
"""Metrics that a tracker gets as they are."""


def logs(step: int, metrics: object = (), **more: object) -> Operation:
    """A call of log."""
    return {"do": "log", "metrics": dict(metrics or {}), "step": step, **more}  # type: ignore[call-overload]


@CONTRACT.add
class TrackersOnRankZero(Clause):
    """log writes on rank 0 only, every number unchanged, and waits for no other rank. A value that is not a number
    raises ArgumentTypeError on every rank that passes it. A tracker that fails stops neither the script nor other
    trackers."""

    id = "LOG-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        update = token_update(round_robin(SEQUENCES, 2, target.world))
        operations = [
            *trained(),
            logs(3, {"reward": {"mean": 1.5}, **NUMBERS}),
            logs(3, {"alone": 2}, ranks=[0]),
            *update,
            logs(4, {"reward": "high"}, may_fail=True),
            *update,
            {"do": "logged"},
        ]
        return [program(target, *operations, accumulation_steps=2, trackers=[FAILS, KEEPS])]

    @override
    def check(self, execution: Execution) -> None:
        for rank, entries in enumerate(execution.last("logged")):
            kept = [(entry["step"], entry.get("reward/mean"), entry.get("alone")) for entry in entries]
            expected = [(3, 1.5, None), (3, None, 2)] if rank == 0 else []
            self.require(kept == expected, f"rank {rank}: expected the tracker to get {expected}, got {kept}")
            for entry in entries[:1]:
                got = {name: entry.get(name) for name in NUMBERS}
                self.require_same(NUMBERS, got, f"rank {rank}: the numbers that the tracker got")
        for rank, refused in enumerate(execution.last("log")):
            self.require_error(refused, "ArgumentTypeError", "log", "reward", where=f"log of a text on rank {rank}")


@CONTRACT.add
class LossOfAnUpdate(Clause):
    """The loss of an update, in the result of optimizer_step and in log, is the mean of the losses over micro-batches
    and ranks or, with denominators, the sum of the losses over the sum of the denominators. All ranks get the same."""

    id = "LOG-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, 7, 1), self._program(target, 8, 2)]

    def _program(self, target: Target, seed: int, backwards: int) -> Program:
        """Two updates without denominators, and one with."""
        operations: list[Operation] = []
        for step in range(2):
            operations += [*updates(1, 2, first=10 * step, backwards=backwards), logs(step)]
        operations += [*token_update(round_robin(SEQUENCES, 3, target.world)), logs(2), {"do": "logged"}]
        return program(target, *trained(seed=seed), *operations, accumulation_steps=2, trackers=[KEEPS])

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(lambda seed, backwards: self._program(target, seed, backwards), SEEDS, st.integers(1, 2))

    @override
    def check(self, execution: Execution) -> None:
        self.require_same_on_all_ranks(execution, "step")
        expected = self._losses(execution)
        logged = [entry.get("model/loss") for entry in execution.last("logged")[0]]
        reported = [seen[0]["loss"] for _, _, seen in execution.each("step") if seen[0]["applied"]]
        for where, losses in [("optimizer_step", reported), ("log", logged)]:
            fits = len(losses) == len(expected) and all(map(close, losses, expected))
            self.require(fits, f"{where}: expected the losses {expected}, got {losses}")
        between = [seen[0]["loss"] for _, _, seen in execution.each("step") if not seen[0]["applied"]]
        self.require(set(between) == {None}, f"expected no loss between updates, got {between}")

    def _losses(self, execution: Execution) -> list[float]:
        """The loss of each update, from what every backward was called with."""
        losses: list[float] = []
        total, micro_batches = 0.0, 0
        for index, operation in enumerate(execution.program.operations):
            seen = [execution.at(rank, index) for rank in range(execution.target.world)]
            if operation["do"] in ("backward", "backward_over"):
                total += sum(seen)
            elif operation["do"] == "step":
                micro_batches += 1
                if seen[0]["applied"]:
                    items = seen[0]["denominator"]
                    losses.append(total / (micro_batches * len(seen) if items is None else items))
                    total, micro_batches = 0.0, 0
        return losses
