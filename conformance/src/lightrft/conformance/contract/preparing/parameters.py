"""Parameters: which of them train, their gradient hooks, and the model that they belong to."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error
from lightrft.conformance.contract.program_parts import program, trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS, assert_close, assert_norms


@CONTRACT.add
class RequiresGradChanges(Clause):
    """requires_grad of a parameter may change between updates, also after an evaluation, a reference pass, offloading
    or torch.inference_mode: the update is that of plain torch, though a strategy may refuse parameters that are frozen
    at the update. An evaluation between updates changes none of them."""

    id = "PREP-11"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._reference_passes(target, "head"),
            self._reference_passes(target, "blocks.0", inference_mode=True),
            self._frozen_later(target, "head"),
            self._frozen_later(target, "blocks.1", inference_mode=True),
            self._frozen_later(target, "head", away=True),
            self._evaluations_within_updates(target),
        ]

    def _reference_passes(
        self, target: Target, part: str, kind: str = "regressor", inference_mode: bool = False
    ) -> Program:
        """A part is frozen for an evaluation before each update, as PEFT does with what an adapter trains."""
        freeze: Operation = {"do": "freeze", "model": "a", "part": part}
        evaluate: Operation = {"do": "evaluate", "model": "a", "batch": 50, "inference_mode": inference_mode}
        passes = [
            operation
            for update in range(3)
            for operation in [freeze, evaluate, {**freeze, "trainable": True}, *updates(1, first=update)]
        ]
        return program(target, *trained(kind=kind, seed=3, lr=1e-2), *passes, READ_WEIGHTS)

    def _frozen_later(self, target: Target, part: str, inference_mode: bool = False, away: bool = False) -> Program:
        """A part is frozen after an evaluation, and unfrozen after another; with ``away``, the model is then
        offloaded."""
        freeze: Operation = {"do": "freeze", "model": "a", "part": part}
        evaluate: Operation = {"do": "evaluate", "model": "a", "batch": 50, "inference_mode": inference_mode}
        offload: list[Operation] = [{"do": do, "model": "a"} for do in ("offload_model", "reload_model") if away]
        later = [
            operation
            for update, trainable in ((1, False), (2, True))
            for operation in [evaluate, {**freeze, "trainable": trainable}, *offload, *updates(1, first=update)]
        ]
        later = [{**operation, "may_fail": True} for operation in later]
        return program(target, *trained(seed=4, lr=1e-2), *updates(1), *later, READ_WEIGHTS)

    def _evaluations_within_updates(self, target: Target) -> Program:
        evaluate: Operation = {"do": "evaluate", "model": "a", "batch": 50}
        within = [
            operation
            for update in range(3)
            for index in range(2)
            for operation in (
                *updates(1, first=2 * update + index)[:-1],
                evaluate,
                {"do": "step", "model": "a", "scheduled": False},
            )
        ]
        return program(target, *trained(seed=5, lr=1e-2), *within, READ_WEIGHTS, accumulation_steps=2)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda part, mode: self._reference_passes(target, part, inference_mode=mode),
            st.sampled_from(["head", "blocks.0", "blocks.1"]),
            st.booleans(),
        )

    @override
    def check(self, execution: Execution) -> None:
        refused = [(index, seen) for index, _, seen in execution.each("step") if any(map(is_error, seen))]
        for index, seen in refused[:1]:
            for rank, reported in enumerate(seen):
                where = f"rank {rank}, step (operation {index}) with parameters frozen between updates"
                self.require_error(reported, "StrategyError", "frozen", where=where)
        if not refused:
            assert_norms(self, execution)
            assert_close(self, execution)


@CONTRACT.add
class GradientHooks(Clause):
    """Gradient hooks that were registered on a parameter before preparing act as in plain torch, or preparing refuses
    the model and names the parameter."""

    id = "PREP-12"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, "regressor", "head.weight"),
            self._program(target, "regressor", "blocks.0.linear.weight", accumulation_steps=2),
            self._program(target, "language", "embedding.weight"),
        ]

    def _program(self, target: Target, kind: str, parameter: str, accumulation_steps: int = 1) -> Program:
        build, *rest = trained(kind=kind, seed=6, lr=1e-2)
        later = [
            {**operation, "may_fail": True} for operation in [*rest, *updates(3, accumulation_steps), READ_WEIGHTS]
        ]
        register: Operation = {"do": "hook", "model": "a", "parameter": parameter}
        return program(target, build, register, *later, accumulation_steps=accumulation_steps)

    @override
    def check(self, execution: Execution) -> None:
        reported = execution.last("prepare")
        if not any(map(is_error, reported)):
            assert_norms(self, execution)
            assert_close(self, execution)
            return
        parameter = execution.program.operations[1]["parameter"]
        for rank, observed in enumerate(reported):
            self.require_error(observed, "LightRFTError", parameter, where=f"rank {rank}, a model with a gradient hook")


@CONTRACT.add
class UnsharedParameters(Clause):
    """A parameter belongs to one prepared model. prepare refuses a model that shares a module, a parameter or the
    memory of a parameter with a prepared model, for training and for inference, and the error says so. The first model
    continues to train."""

    id = "PREP-13"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, first) for first in (False, True)]

    def _program(self, target: Target, wrap_first: bool) -> Program:
        build, *rest = trained(wrap_first=wrap_first)
        shared = [(what, f"{what} {purpose}") for what in ("module", "parameter", "memory") for purpose in ("t", "i")]
        others: list[Operation] = [
            {"do": "build", "model": name, "of": "a", "shares": what, "seed": 2} for what, name in shared
        ]
        optimizers: list[Operation] = [
            {"do": "optimizer", "model": name, "plain_adamw": True} for _, name in shared if name.endswith("t")
        ]
        refused: list[Operation] = [
            {"do": "prepare" if name.endswith("t") else "prepare_inference", "model": name, "may_fail": True}
            for _, name in shared
        ]
        return program(target, build, *others, *optimizers, *rest, *refused, *updates(2), READ_WEIGHTS)

    @override
    def check(self, execution: Execution) -> None:
        for index, operation in enumerate(execution.program.operations):
            if operation.get("may_fail"):
                for rank in range(execution.target.world):
                    where = f"rank {rank}, {operation['do']} of a model that shares a {operation['model'][:-2]}"
                    self.require_error(execution.at(rank, index), "StrategyError", "share", "parameter", where=where)
        assert_close(self, execution)
