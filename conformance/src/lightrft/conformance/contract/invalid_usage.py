"""OPT: invalid usage, and the result of a step."""

from collections.abc import Sequence
from itertools import product

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error, show
from lightrft.conformance.contract.program_parts import micro_batch, program, trained, updates
from lightrft.conformance.contract.reference_checks import (
    READ_STATE,
    READ_WEIGHTS,
    assert_close,
    assert_flags,
    assert_unchanged,
    norm_fits,
)


@CONTRACT.add
class BadLosses(Clause):
    """backward raises an error that names the problem if the loss is not a scalar, has no graph or belongs to another
    model, if the optimizer belongs to another model, or if the strategy has not prepared the model. optimizer_step
    refuses the optimizer of another model too."""

    id = "OPT-11"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        bad: list[Operation] = [
            {"do": "bad_backward", "model": "a", "what": what, "may_fail": True}
            for what in ("vector", "detached", "number")
        ]
        mixed = {"do": "backward", "model": "a", "batch": 0, "optimizer_of": "b", "may_fail": True}
        mixed_step = {"do": "step", "model": "a", "optimizer_of": "b", "may_fail": True}
        others = {"do": "backward", "model": "a", "batch": 0, "loss_of": "b", "may_fail": True}
        build = {"do": "build", "model": "c", "seed": 4}
        inference: list[Operation] = [
            build,
            {"do": "optimizer", "model": "c", "plain_adamw": True},
            {"do": "prepare_inference", "model": "c"},
        ]
        unused = {"do": "backward", "model": "c", "batch": 0, "may_fail": True}
        return [
            program(
                target,
                *trained("a"),
                *trained("b", seed=2),
                *bad,
                mixed,
                mixed_step,
                others,
                *inference,
                unused,
                *updates(2),
                READ_WEIGHTS,
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        words = {"vector": ("loss", "scalar"), "detached": ("loss", "graph"), "number": ("loss",)}
        for rank in range(execution.target.world):
            for index, operation in enumerate(execution.program.operations):
                observed = execution.at(rank, index)
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
                        where=f"rank {rank}, {operation['do']} with another model's optimizer",
                    )
                elif "loss_of" in operation:
                    where = f"rank {rank}, backward with another model's loss"
                    self.require_error(observed, "StrategyError", "loss", where=where)
                elif operation["do"] == "backward" and operation["model"] == "c":
                    self.require(
                        is_error(observed),
                        f"rank {rank}: backward of a model that is not in training: expected an error, got none",
                    )
        assert_close(self, execution)


@CONTRACT.add
class WrongOnOneRank(Clause):
    """If one of several ranks passes the optimizer, the model or the scheduler of another model to optimizer_step,
    every rank raises at the call that ends the update, so that no rank waits for another; on the other ranks, the
    message names that rank. Weights, optimizer state, learning rates and schedule are unchanged, the gradient is
    cleared, and the next update works."""

    id = "OPT-23"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        operations = [*trained("a", schedule=True), *trained("b", seed=2, schedule=True)]
        operations += updates(1, 2, scheduled=True)
        cases = product(("optimizer", "model", "scheduler"), range(2))
        for number, (wrong, position) in enumerate(cases):
            rank = 0 if number % 4 == 1 else target.world - 1
            operations += [
                READ_STATE,
                *self._update(10 * number, wrong, position, rank, counted=number % 3 > 0),
                READ_STATE,
            ]
        operations += updates(2, 2, first=100, scheduled=True)
        return [program(target, *operations, READ_WEIGHTS, {"do": "weights", "model": "b"}, accumulation_steps=2)]

    def _update(self, batch: int, wrong: str, position: int, rank: int, *, counted: bool) -> list[Operation]:
        """An update of two micro-batches, of which ``rank`` ends one with a ``wrong`` argument."""
        operations: list[Operation] = []
        for index in range(2):
            backward, step = micro_batch(batch + index, scheduled=True)
            mistake = {"wrong": wrong, "wrong_rank": rank} if index == position else {}
            boundary = {} if counted else {"boundary": index == 1}
            operations += [backward, {**step, **mistake, **boundary}]
        operations[-1] = {**operations[-1], "may_fail": True}
        return operations

    @override
    def check(self, execution: Execution) -> None:
        mistake: Operation = {}
        for index, operation, seen in execution.each("step"):
            mistake = operation if "wrong" in operation else mistake
            if operation.get("may_fail"):
                self._check_errors(mistake, seen)
                continue
            expected = execution.predicted()[index]["applied"]
            self.require(
                all(result["applied"] is expected for result in seen),
                f"step (operation {index}): expected applied={expected}, got {show(list(seen))}",
            )
        states = [seen for _, _, seen in execution.each("state")]
        for before, after in zip(states[::2], states[1::2], strict=True):
            assert_unchanged(self, before, after, "a refused update")
        for model in ("a", "b"):
            assert_close(self, execution, model)

    def _check_errors(self, mistake: Operation, seen: Sequence[object]) -> None:
        for rank, observed in enumerate(seen):
            words = ["optimizer_step", mistake["wrong"]]
            words += [] if rank == mistake["wrong_rank"] else [f"rank {mistake['wrong_rank']}"]
            where = f"rank {rank}, an update with another model's {mistake['wrong']} on rank {mistake['wrong_rank']}"
            self.require_error(observed, "LightRFTError", *words, where=where)


@CONTRACT.add
class UnpreparedModels(Clause):
    """A strategy with the capability "unprepared_models" accepts an unprepared model and its optimizer at first use.
    Any other strategy refuses them, and the error says that the model was not prepared."""

    id = "OPT-18"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        bare = [
            {"do": "build", "model": "a", "seed": 3},
            {"do": "optimizer", "model": "a", "plain_adamw": True, "weight_decay": 0.0},
        ]
        return [program(target, *({**operation, "may_fail": True} for operation in (*bare, *updates(2), READ_WEIGHTS)))]

    @override
    def check(self, execution: Execution) -> None:
        if "unprepared_models" in execution.target.capabilities:
            for _, _, seen in execution.each("step"):
                self.require(
                    not any(map(is_error, seen)), f"expected an unprepared model to be accepted, got {show(seen)}"
                )
            assert_close(self, execution)
        else:
            for rank, observed in enumerate(next(iter(execution.each("backward")))[2]):
                self.require_error(
                    observed, "StrategyError", "prepare", where=f"rank {rank}, backward of an unprepared model"
                )


@CONTRACT.add
class Result(Clause):
    """optimizer_step returns whether the update was applied, whether it was skipped, and the gradient norm before
    clipping."""

    id = "OPT-12"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            program(
                target,
                *trained(),
                *updates(1, 2),
                *updates(1, 2, first=5, poison="nan"),
                *updates(1, 2, first=9),
                accumulation_steps=2,
                max_norm=0.1,
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        assert_flags(self, execution, "applied", "skipped")
        for index, _, seen in execution.each("step"):
            expected = execution.predicted()[index]["grad_norm"]
            for rank, result in enumerate(seen):
                norm = result["grad_norm"]
                fits = norm is None if expected is None else norm_fits(norm, expected)
                self.require(fits, f"rank {rank}, step (operation {index}): expected the norm {expected}, got {norm}")
