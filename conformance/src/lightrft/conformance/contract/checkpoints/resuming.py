"""Training continues from a checkpoint as if it had not been interrupted."""

from collections.abc import Sequence
from itertools import chain

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import (
    CONTRACT,
    Execution,
    Operation,
    Program,
    Settings,
    Target,
    show,
)
from lightrft.conformance.contract.checkpoints.on_disk import (
    FINGERPRINT,
    RESTART,
    OnDisk,
    loaded,
    saved,
)
from lightrft.conformance.contract.program_parts import BF16, FP32, SEEDS, trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS


@CONTRACT.add
class ExactResume(OnDisk):
    """Resuming is exact: training that resumes from a checkpoint gives the same result, bit for bit, as training that
    continued after saving it. This covers the model, optimizer, scheduler, step and skip counters, moving averages, all
    random states and the data position, and each rank's own buffers. A resumable checkpoint is taken between updates:
    saving raises while gradients are pending. A model that was
    prepared for inference can be saved at any time."""

    id = "CKPT-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [self._resume(target), self._pending(target), self._last_skip(target), self._back(target)]
        programs.append(self._resume(target, kind="running statistics"))
        return [*programs, self._resume(target, BF16)] if target.world == 1 else programs

    def _resume(
        self,
        target: Target,
        precision: Settings = FP32,
        kind: str = "regressor",
        seed: int = 1,
        before: int = 3,
        after: int = 2,
    ) -> Program:
        setup: list[Operation] = [
            *trained(kind=kind, seed=seed, schedule=True),
            {"do": "build", "model": "e", "kind": kind, "seed": seed},
            {"do": "prepare_inference", "model": "e"},
            {"do": "loader", "name": "l", "samples": 40, "batch_size": 2},
            {"do": "loader", "name": "m", "samples": 30, "batch_size": 1},
        ]
        averaging: Operation = {"do": "average", "model": "a", "into": "e", "beta": 0.9}
        first: list[Operation] = [
            *({"do": "seed", "value": 100 + rank, "ranks": [rank]} for rank in range(target.world)),
            {"do": "draw"},
            *updates(before, scheduled=True, first=seed),
            {"do": "set_decay", "model": "a", "weight_decay": 0.5},
            {"do": "set_betas", "model": "a", "betas": [0.8, 0.9]},
            averaging,
            {"do": "batches", "name": "l", "epoch": 1, "first": 3},
            {"do": "batches", "name": "m", "epoch": 2, "first": 1},
            {"do": "save", "model": ["a", "e"], "tag": "t"},
        ]
        rest: list[Operation] = [
            averaging,  # the second average after one update must change nothing
            FINGERPRINT,
            {"do": "draw"},
            *updates(after, scheduled=True, first=seed + 500),
            averaging,
            {"do": "rest_of_epoch", "name": "l"},
            {"do": "rest_of_epoch", "name": "m"},
            {"do": "batches", "name": "l", "epoch": 2},
            {"do": "batches", "name": "m", "epoch": 4},
            {"do": "weights", "model": "e"},
            READ_WEIGHTS,
            FINGERPRINT,
        ]
        again: list[Operation] = [RESTART, *setup, {"do": "load", "model": ["a", "e"], "tag": "t"}]
        return self.program(target, *setup, *first, *rest, *again, *rest, **precision)

    def _pending(self, target: Target) -> Program:
        half: Operation = {"do": "backward", "model": "a", "batch": 3}
        weights: list[Operation] = [
            {"do": "build", "model": "e"},
            {"do": "prepare_inference", "model": "e"},
            {"do": "save", "model": "e", "tag": "e"},
        ]
        both: Operation = {"do": "save", "model": ["b", "a"], "tag": "v", "may_fail": True}
        return self.program(
            target, *trained(), *trained("b", seed=2), *updates(1, 2), half, saved(may_fail=True), {"do": "step", "model": "a"},
            saved("u", may_fail=True), both, *weights, accumulation_steps=2,
        )  # fmt: skip

    def _back(self, target: Target) -> Program:
        """Return to the state before training, and train again, in one process."""
        rest = [*updates(2, scheduled=True), READ_WEIGHTS, FINGERPRINT]
        return self.program(target, *trained(schedule=True), saved(), *rest, loaded(), *rest)

    def _last_skip(self, target: Target) -> Program:
        bad: list[Operation] = [
            {"do": "backward", "model": "a", "batch": 5, "poison": "nan"},
            {"do": "step", "model": "a", "may_fail": True},
        ]
        return self.program(
            target, *trained(), *updates(1), *bad, saved(), RESTART, *trained(), loaded(), *bad, max_skipped_updates=2
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        live_buffers = st.builds(  # torch's batch norm cannot mix fp32 buffers and bf16 weights on the CPU
            lambda seed, before: self._resume(target, FP32, "running statistics", seed, before),
            SEEDS,
            st.integers(0, 3),
        )
        return live_buffers | st.builds(
            lambda precision, kind, seed, before, after: self._resume(target, precision, kind, seed, before, after),
            st.sampled_from([FP32, BF16]), st.sampled_from(["regressor", "language", "frozen", "unused"]), SEEDS,
            st.integers(0, 3), st.integers(1, 3),
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        operations = execution.program.operations
        if execution.program.settings.get("max_skipped_updates") == 2:
            for error in self.errors(execution, len(operations) - 2):
                self.require_error(error, "StrategyError", "in a row", where="the second skip in a row, after loading")
            return
        if not any(operation.get("may_fail") for operation in operations) and RESTART not in operations:
            self._check_halves(execution, next(index for index, _, _ in execution.each("load")))
            return
        starts = [index for index, operation in enumerate(operations) if operation == RESTART]
        if not starts:
            failed = [index for index, operation in enumerate(operations) if operation.get("may_fail")]
            for index in failed:
                for error in self.errors(execution, index):
                    self.require_error(error, "StrategyError", "gradient", where="save_ckpt with a gradient pending")
            execution.at(0, len(operations) - 1)
            return
        self._check_halves(execution, starts[0])

    def _check_halves(self, execution: Execution, start: int) -> None:
        operations = execution.program.operations
        length = (
            len(operations)
            - 1
            - next(i for i, operation in enumerate(operations) if i >= start and operation["do"] == "load")
            - 1
        )
        first = start - length
        for rank in range(execution.target.world):
            for step in range(length):
                one, other = execution.at(rank, first + step), execution.at(rank, len(operations) - 1 - length + step)
                what = operations[first + step]["do"]
                self.require_same(one, other, f"rank {rank}: {what} after loading")


@CONTRACT.add
class MicroBatches(OnDisk):
    """A run can continue with a different micro-batch size and the same train_batch_size: loading restores the weights,
    the optimizer and the counters, and the loaders continue with the next sample in the same order."""

    id = "CKPT-13"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, 4, 2), self._program(target, 1, 4)]

    def _program(self, target: Target, before: int, after: int) -> Program:
        def setup(size: int) -> list[Operation]:
            loader = {"do": "loader", "name": "l", "samples": 16 * target.world, "batch_size": size}
            return [*trained(schedule=True), loader]

        state: Operation = {"do": "state", "model": "a"}
        rest: Operation = {"do": "rest_of_epoch", "name": "l"}
        restart: Operation = {"do": "restart", "settings": {"micro_train_batch_size": after}}
        first = [
            *updates(2, 4 // before, scheduled=True),
            {"do": "batches", "name": "l", "epoch": 1, "first": 4 // before},
        ]
        more = updates(1, 4 // after, first=50, scheduled=True)
        return self.program(
            target, *setup(before), *first, saved(), state, rest, restart, *setup(after), loaded(), state, rest, *more,
            micro_train_batch_size=before, train_batch_size=4 * target.world,
        )  # fmt: skip

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        sizes = st.sampled_from([1, 2, 4])
        return st.builds(lambda before, after: self._program(target, before, after), sizes, sizes)

    @override
    def check(self, execution: Execution) -> None:
        before, after = (seen for _, _, seen in execution.each("state"))
        wanted, samples = (seen for _, _, seen in execution.each("rest_of_epoch"))
        for rank in range(execution.target.world):
            self.require_same(before[rank], after[rank], f"rank {rank}: expected the state that was saved")
            self.require(
                [*chain(*samples[rank])] == [*chain(*wanted[rank])],
                f"rank {rank}: expected the loader to continue with {show(wanted[rank])}, got {show(samples[rank])}",
            )
        for _, _, seen in list(execution.each("step"))[-1:]:
            for rank, result in enumerate(seen):
                self.require(
                    bool(result["applied"]), f"rank {rank}: expected an update of the new number of micro-batches"
                )
