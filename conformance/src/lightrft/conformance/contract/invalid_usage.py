"""OPT: invalid usage, and the result of a step."""

from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error, show
from lightrft.conformance.contract.program_parts import program, trained, updates
from lightrft.conformance.contract.reference_checks import LOOK, assert_close, assert_flags, norm_fits


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
            {"do": "optimizer", "model": "c", "by_hand": True},
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
                LOOK,
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
class Adoption(Clause):
    """A strategy with the capability "adoption" accepts an unprepared model and its optimizer at first use. Any other
    strategy refuses them, and the error says that the model was not prepared."""

    id = "OPT-18"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        bare = [
            {"do": "build", "model": "a", "seed": 3},
            {"do": "optimizer", "model": "a", "by_hand": True, "weight_decay": 0.0},
        ]
        return [program(target, *({**operation, "may_fail": True} for operation in (*bare, *updates(2), LOOK)))]

    @override
    def check(self, execution: Execution) -> None:
        if "adoption" in execution.target.capabilities:
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
