"""What prepare takes and returns."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Settings, Target
from lightrft.conformance.contract.program_parts import BF16, FP32, KINDS, SEEDS, program, trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS, assert_close

TRIPLE = ["tuple", "model", "optimizer", "scheduler"]
EMPTY = ["tuple", "NoneType", "NoneType", "NoneType"]


@CONTRACT.add
class Structure(Clause):
    """prepare returns its arguments in the same order and structure: a model, (model, optimizer, scheduler), a list of
    models, or None. A single argument is returned without a tuple around it."""

    id = "PREP-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        cases: list[list[object]] = [
            ["model"],
            ["triple"],
            [["model", "model"]],
            ["none"],
            ["empty triple", "model"],
            ["triple", "none", ["model"], "model"],
            [["model", "none"]],
        ]
        return [self._program(target, case) for case in cases]

    def _program(self, target: Target, arguments: Sequence[object]) -> Program:
        return program(target, {"do": "prepare_shapes", "arguments": list(arguments)})

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        single = st.sampled_from(["model", "triple", "none", "empty triple"])
        many = st.lists(st.sampled_from(["model", "none"]), min_size=1, max_size=2)
        return st.lists(single | many, min_size=1, max_size=3).map(lambda arguments: self._program(target, arguments))

    @override
    def check(self, execution: Execution) -> None:
        arguments = execution.program.operations[0]["arguments"]
        expected = [_shape(argument) for argument in arguments]
        for rank, seen in enumerate(execution.last("prepare_shapes")):
            returned = [seen] if len(arguments) == 1 else seen[1:]
            self.require(
                returned == expected, f"rank {rank}: prepare{tuple(arguments)}: expected {expected}, got {returned}"
            )


def _shape(argument: object) -> object:
    if isinstance(argument, list):
        return ["list", *(_shape(item) for item in argument)]
    return {"model": "model", "triple": TRIPLE, "empty triple": EMPTY, "none": "NoneType"}[str(argument)]


@CONTRACT.add
class Unwrapping(Clause):
    """unwrap_model returns the original model, not a copy, with its class and parameter names, also from an actor and
    from a model that was compiled with torch.compile. Unwrapping twice is the same as unwrapping once."""

    id = "PREP-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, [*trained()], 1),
            self._program(target, [*trained(actor=True, kind="language")], 3),
            *(
                self._program(
                    target, [{"do": "build", "model": "a", "kind": kind}, {"do": "prepare_inference", "model": "a"}], 2
                )
                for kind in ("regressor", "language")
            ),
            self._program(target, [{"do": "build", "model": "a"}], 1),
            self._program(target, [*trained(compiled=True)], 2),
        ]

    def _program(self, target: Target, before: Sequence[Operation], times: int) -> Program:
        return program(target, *before, {"do": "unwrapped", "model": "a", "times": times})

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, actor, first, times: self._program(target, trained(kind=kind, actor=actor, wrap_first=first), times),
            KINDS, st.booleans(), st.booleans(), st.integers(1, 4),
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        kind = execution.program.operations[0].get("kind", "regressor")
        names = [name for name, _ in models.build(kind, 0).named_parameters()]
        for rank, seen in enumerate(execution.last("unwrapped")):
            self.require(seen["same_class"], f"rank {rank}: unwrap_model returned another class")
            self.require(seen["names"] == names, f"rank {rank}: expected the parameters {names}, got {seen['names']}")
            self.require(seen["same_object"], f"rank {rank}: unwrapping twice returned another object")
            self.require(seen["shares_parameters"], f"rank {rank}: unwrap_model returned a copy")


@CONTRACT.add
class OrderOfCalls(Clause):
    """This order works in every strategy: build the model, call create_optimizer, build the scheduler, call prepare.
    prepare returns the caller's own optimizer and scheduler objects. Wrapping the model first and then creating the
    optimizer also works everywhere, with the same result."""

    id = "PREP-8"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, first, precision) for first in (False, True) for precision in (FP32, BF16)]

    def _program(
        self, target: Target, wrap_first: bool, precision: Settings, seed: int = 8, kind: str = "regressor"
    ) -> Program:
        setup = trained(kind=kind, seed=seed, schedule=True, wrap_first=wrap_first)
        return program(target, *setup, *updates(3, scheduled=True), READ_WEIGHTS, precision=precision)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda first, seed, kind: self._program(target, first, FP32, seed, kind), st.booleans(), SEEDS, KINDS
        )

    @override
    def check(self, execution: Execution) -> None:
        for _, _, seen in execution.each("prepare"):
            for rank, returned in enumerate(seen):
                self.require(
                    all(returned.values()), f"rank {rank}: prepare did not return the caller's own objects: {returned}"
                )
        if not execution.program.settings["bf16"]:
            assert_close(self, execution)
        else:
            self.require(
                all(observed["applied"] for _, _, seen in execution.each("step") for observed in seen),
                "an update was not applied",
            )


@CONTRACT.add
class RlhfModels(Clause):
    """prepare_models_and_optimizers returns ((actor, optimizer, scheduler), (critic, optimizer, scheduler),
    reward_models, initial_model), with (None, None, None) if there is no critic. Actor and critic have their own
    learning rates. The actor may have been prepared by prepare_model before."""

    id = "PREP-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [self._program(target, critic, rewards) for critic in (False, True) for rewards in (0, 2)]
        return [*programs, self._program(target, critic=True, rewards=0, prepared=True)]

    def _program(self, target: Target, critic: bool, rewards: int, prepared: bool = False) -> Program:
        prepare: Operation = {"do": "prepare_set", "critic": critic, "rewards": rewards, "prepared": prepared}
        return program(
            target,
            prepare,
            critic_pretrain=critic,
            lr_warmup_ratio=0.2,
            actor_learning_rate=1e-3,
            critic_learning_rate=2e-3,
        )

    @override
    def check(self, execution: Execution) -> None:
        request = execution.program.operations[0]
        rewards = ["list", *["model"] * request["rewards"]] if request["rewards"] else "NoneType"
        expected = ["tuple", TRIPLE, TRIPLE if request["critic"] else EMPTY, rewards, "model"]
        for rank, seen in enumerate(execution.last("prepare_set")):
            self.require(
                seen["structure"] == expected,
                f"rank {rank}: expected the structure {expected}, got {seen['structure']}",
            )
            self.require(
                seen["rate"] == 0.0, f"rank {rank}: expected a warm-up from the learning rate 0, got {seen['rate']}"
            )
            peaks = [1e-3, 2e-3] if request["critic"] else [1e-3]
            self.require(
                seen["peaks"] == peaks, f"rank {rank}: expected the peak learning rates {peaks}, got {seen['peaks']}"
            )
