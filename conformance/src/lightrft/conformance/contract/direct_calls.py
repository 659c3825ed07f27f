"""PREP: scripts that call a prepared model's optimizer or change its weights directly, and optimizers other than AdamW."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error
from lightrft.conformance.contract.program_parts import micro_batch, program, trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS, assert_close, assert_norms


def _may_fail(operations: Sequence[Operation]) -> list[Operation]:
    return [{**operation, "may_fail": True} for operation in operations]


def _first_error(execution: Execution, rank: int) -> tuple[int, Any] | None:
    """The first operation that raised an error on ``rank``, and the error."""
    observations = ((index, execution.at(rank, index)) for index in range(len(execution.program.operations)))
    return next(((index, seen) for index, seen in observations if is_error(seen)), None)


@CONTRACT.add
class DirectCalls(Clause):
    """Direct calls to the optimizer of a prepared model act as in plain torch, or are refused, on every rank: zero_grad
    within an update never discards gradients, step never bypasses the strategy, and a parameter group that is added
    later trains like the others, or is refused."""

    id = "PREP-14"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            *(self._clearing(target, of) for of in ("optimizer", "model")),
            program(
                target,
                *trained(seed=3),
                micro_batch(0)[0],
                {"do": "direct_step", "model": "a", "may_fail": True},
                micro_batch(0)[1],
                READ_WEIGHTS,
            ),
            self._growing(target),
        ]

    def _clearing(self, target: Target, of: str) -> Program:
        clear: Operation = {"do": "zero_grad", "model": "a", "of": of, "may_fail": True}
        operations = [*micro_batch(0), clear, *micro_batch(1)]
        return program(
            target,
            *trained(seed=3),
            clear,
            *operations,
            clear,
            *updates(1, 2, first=7),
            READ_WEIGHTS,
            accumulation_steps=2,
        )

    def _growing(self, target: Target) -> Program:
        grow: Operation = {"do": "add_group", "model": "a", "part": "blocks.0", "lr": 1e-3}
        return program(
            target,
            *trained(kind="frozen", seed=3),
            *updates(1),
            *_may_fail([grow, *updates(3, first=5), READ_WEIGHTS]),
            max_norm=0.1,
        )

    @override
    def check(self, execution: Execution) -> None:
        operations = execution.program.operations
        errors = [_first_error(execution, rank) for rank in range(execution.target.world)]
        for rank in range(execution.target.world):
            for index, operation in enumerate(operations):
                observed, where = execution.at(rank, index), f"rank {rank}, {operation['do']} (operation {index})"
                if operation["do"] == "direct_step" or (operation["do"] == "zero_grad" and is_error(observed)):
                    words = {"direct_step": "optimizer_step", "zero_grad": "zero_grad"}[operation["do"]]
                    self.require_error(observed, "StrategyError", words, where=where)
        if any(operation["do"] == "add_group" for operation in operations) and any(errors):
            for rank, error in enumerate(errors):
                where = f"rank {rank}, a parameter group that was added after preparing"
                self.require_error(error and error[1], "StrategyError", "group", where=where)
            return
        assert_close(self, execution)
        assert_norms(self, execution)


@CONTRACT.add
class NonElementwiseOptimizers(Clause):
    """An optimizer whose update is not element by element trains as in plain torch, or prepare refuses it on every
    rank, with an error that names its class."""

    id = "PREP-15"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, algorithm, kind)
            for algorithm, kind in [("Adafactor", "regressor"), ("TrustRatio", "regressor"), ("Muon", "matrices")]
        ]

    def _program(self, target: Target, algorithm: str, kind: str) -> Program:
        build: Operation = {"do": "build", "model": "a", "kind": kind, "seed": 4}
        optimizer: Operation = {"do": "own_optimizer", "model": "a", "algorithm": algorithm, "lr": 1e-3}
        more = _may_fail([{"do": "prepare", "model": "a"}, *updates(3), READ_WEIGHTS])
        return program(target, build, optimizer, *more)

    @override
    def check(self, execution: Execution) -> None:
        algorithm = execution.program.operations[1]["algorithm"]
        prepared = execution.last("prepare")
        if any(map(is_error, prepared)):
            for rank, observed in enumerate(prepared):
                where = f"rank {rank}, prepare with {algorithm}"
                self.require_error(observed, "LightRFTError", algorithm, where=where)
            return
        for rank in range(execution.target.world):
            error = _first_error(execution, rank)
            self.require(error is None, f"rank {rank}: {algorithm} was prepared, and raised later: {error}")
        assert_close(self, execution)


@CONTRACT.add
class WrittenWeights(Clause):
    """Weights that a script writes to a prepared model between updates take effect, or the next update refuses them
    with an error that names load_model. Writes through .data may go unnoticed."""

    id = "PREP-16"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, before, part) for before, part in [(0, "head"), (2, "blocks.1")]]

    def _program(self, target: Target, before: int, part: str) -> Program:
        write: Operation = {"do": "write_weights", "model": "a", "part": part, "factor": 0.5}
        return program(
            target, *trained(seed=6), *updates(before), *_may_fail([write, *updates(2, first=5), READ_WEIGHTS])
        )

    @override
    def check(self, execution: Execution) -> None:
        errors = [_first_error(execution, rank) for rank in range(execution.target.world)]
        if not any(errors):
            assert_close(self, execution)
            return
        for rank, error in enumerate(errors):
            where = f"rank {rank}, weights written between updates"
            self.require_error(error and error[1], "StrategyError", "load_model", where=where)
