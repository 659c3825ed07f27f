"""PREP: preparing models."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, same, show
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.program_parts import BF16, FP32, KINDS, SEEDS, geometry, trained, updates
from lightrft.conformance.contract.reference_checks import LOOK, assert_close

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
        return Program(
            operations=({"do": "prepare_shapes", "arguments": list(arguments)},), settings={**FP32, **geometry(target)}
        )

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
    """unwrap_model returns the original model, not a copy, with its class and parameter names. Unwrapping twice is the
    same as unwrapping once."""

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
        ]

    def _program(self, target: Target, before: Sequence[Operation], times: int) -> Program:
        return Program(
            operations=(*before, {"do": "unwrapped", "model": "a", "times": times}),
            settings={**FP32, **geometry(target)},
        )

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
class SameFunction(Clause):
    """A prepared model computes what the original model did, for any arguments (fp32: within 1e-6). Buffers keep their
    values and dtypes, also with bf16."""

    id = "PREP-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        inference: list[Operation] = [
            {"do": "build", "model": "a", "kind": "language", "seed": 5},
            {"do": "prepare_inference", "model": "a"},
        ]
        return [
            self._program(target, trained(seed=5)),
            self._program(target, inference),
            self._program(target, trained(kind="language", seed=5, actor=True)),
            self._program(target, trained(kind="shifted", seed=5), shift=0.5),
            *(self._buffers(target, training) for training in (True, False)),
        ]

    def _buffers(self, target: Target, training: bool) -> Program:
        build, *rest = trained(kind="scaled", seed=5)
        look: Operation = {"do": "buffers", "model": "a"}
        prepared = [*rest, *updates(1)] if training else [{"do": "prepare_inference", "model": "a"}]
        return Program(operations=(build, look, *prepared, look), settings={**BF16, **geometry(target)})

    def _program(self, target: Target, before: Sequence[Operation], **keywords: float) -> Program:
        look: Operation = {"do": "forward", "model": "a", "batch": 3, **keywords}
        return Program(operations=(*before, look, {**look, "batch": 4}), settings={**FP32, **geometry(target)})

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, seed, first: self._program(target, trained(kind=kind, seed=seed, wrap_first=first)),
            KINDS,
            SEEDS,
            st.booleans(),
        )

    @override
    def check(self, execution: Execution) -> None:
        looks = [seen for _, _, seen in execution.each("buffers")]
        for rank, (before, after) in enumerate(zip(*looks, strict=True) if looks else ()):
            self.require(same(before, after), f"rank {rank}: expected the buffers {show(before)}, got {show(after)}")
        for index, _, seen in execution.each("forward"):
            for rank, (outputs, expected) in enumerate(zip(seen, execution.predicted()[index], strict=True)):
                worst = (outputs - expected).abs().max().item()
                self.require(worst <= 1e-6, f"rank {rank}: the outputs differ by {worst:.3g}, expected at most 1e-6")


@CONTRACT.add
class OneModel(Clause):
    """After preparing, every rank trains the weights of rank 0, even if the ranks built different ones."""

    id = "PREP-4"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, first) for first in (False, True)]

    def _program(self, target: Target, wrap_first: bool, seed: int = 6, kind: str = "regressor") -> Program:
        operations = (*trained(kind=kind, seed=seed, differ=True, wrap_first=wrap_first), LOOK, *updates(1), LOOK)
        return Program(operations=operations, settings={**FP32, **geometry(target)})

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda first, seed, kind: self._program(target, first, seed, kind), st.booleans(), SEEDS, KINDS
        )

    @override
    def check(self, execution: Execution) -> None:
        first = next(iter(execution.each("weights")))
        for rank, seen in enumerate(first[2]):
            mismatch = tolerances.bitwise(seen, execution.predicted()[first[0]])
            self.require(mismatch is None, f"rank {rank}: expected the weights of rank 0: {mismatch}")
        assert_close(self, execution)


@CONTRACT.add
class Inference(Clause):
    """Models prepared for inference have no optimizer state and never change."""

    id = "PREP-5"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        reference: list[Operation] = [
            {"do": "build", "model": "r", "kind": "regressor", "seed": 1},
            {"do": "prepare_inference", "model": "r"},
        ]
        look: Operation = {"do": "weights", "model": "r"}
        operations = (
            *reference,
            *trained(seed=1),
            look,
            {"do": "forward", "model": "r", "batch": 0},
            *updates(3, first=1),
            look,
            {"do": "state_sizes", "model": "r"},
        )
        return [Program(operations=operations, settings={**FP32, **geometry(target)})]

    @override
    def check(self, execution: Execution) -> None:
        before, after = [seen for _, _, seen in execution.each("weights")]
        for rank in range(execution.target.world):
            mismatch = tolerances.bitwise(after[rank], before[rank])
            self.require(mismatch is None, f"rank {rank}: a model prepared for inference changed: {mismatch}")
        self.require(
            execution.last("state_sizes") == [0] * execution.target.world,
            "a model prepared for inference has optimizer state",
        )


@CONTRACT.add
class Modes(Clause):
    """A model prepared for training is in training mode, with dropout active. One prepared for inference is in
    evaluation mode. Training, reading weights and offloading do not change the mode."""

    id = "PREP-10"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        other: list[Operation] = [
            operation for name, listed in [("r", False), ("s", True)]
            for operation in ({"do": "build", "model": name, "seed": 2}, {"do": "prepare_inference", "model": name, "listed": listed})
        ]  # fmt: skip
        modes: list[Operation] = [{"do": "modes", "model": model} for model in "ars"]
        away: list[Operation] = [
            {"do": do, "model": model} for model in ("a", "r") for do in ("weights", "offload_model", "reload_model")
        ]
        return [
            Program(
                operations=(*trained(wrap_first=first), *other, *modes, *updates(1), *away, *modes),
                settings={**FP32, **geometry(target)},
            )
            for first in (False, True)
        ]

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("modes"):
            expected = operation["model"] == "a"
            self.require(
                seen == [[expected]] * len(seen),
                f"modes (operation {index}) of model {operation['model']}: expected training mode {expected} in every part, got {seen}",
            )


@CONTRACT.add
class MetaInit(Clause):
    """Preparing a model that was built under init_model_context(meta_init=True) gives the same model as building it
    directly. No parameter or buffer is left uninitialized."""

    id = "PREP-6"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        kinds = [("regressor", False), ("language", True), ("scaled", False)]
        return [self._program(target, kind, first) for kind, first in kinds]

    def _program(self, target: Target, kind: str, wrap_first: bool, seed: int = 7) -> Program:
        forward: Operation = {"do": "forward", "model": "a", "batch": 0}
        operations = (
            *trained(kind=kind, seed=seed, meta=True, wrap_first=wrap_first),
            {"do": "uninitialized", "model": "a"},
            LOOK,
            forward,
            *updates(1),
            LOOK,
        )
        return Program(operations=operations, settings={**FP32, **geometry(target)})

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, first, seed: self._program(target, kind, first, seed), KINDS, st.booleans(), SEEDS
        )

    @override
    def check(self, execution: Execution) -> None:
        for rank, seen in enumerate(execution.last("uninitialized")):
            self.require(not seen, f"rank {rank}: not initialized: {seen}")
        index, _, seen = next(iter(execution.each("weights")))
        for rank, weights in enumerate(seen):
            mismatch = tolerances.bitwise(weights, execution.predicted()[index])
            self.require(mismatch is None, f"rank {rank}: expected the model that rank 0 built: {mismatch}")
        index, _, outputs = next(iter(execution.each("forward")))
        for rank, (output, expected) in enumerate(zip(outputs, execution.predicted()[index], strict=True)):
            self.require(
                torch.allclose(output, expected, atol=1e-6),
                f"rank {rank}: expected the outputs {show(expected)}, got {show(output)}",
            )
        assert_close(self, execution)


@CONTRACT.add
class OnePath(Clause):
    """This order works in every strategy: build the model, call create_optimizer, build the scheduler, call prepare.
    prepare returns the caller's own optimizer and scheduler objects. Wrapping the model first and then creating the
    optimizer also works everywhere, with the same result."""

    id = "PREP-8"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, first, precision) for first in (False, True) for precision in (FP32, BF16)]

    def _program(
        self, target: Target, wrap_first: bool, precision: object, seed: int = 8, kind: str = "regressor"
    ) -> Program:
        settings = {**(BF16 if precision is BF16 else FP32), **geometry(target)}
        operations = (
            *trained(kind=kind, seed=seed, schedule=True, wrap_first=wrap_first),
            *updates(3, scheduled=True),
            LOOK,
        )
        return Program(operations=operations, settings=settings)

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
class WholeSet(Clause):
    """prepare_models_and_optimizers returns ((actor, optimizer, scheduler), (critic, optimizer, scheduler),
    reward_models, initial_model), with (None, None, None) if there is no critic. Actor and critic have their own
    learning rates."""

    id = "PREP-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, critic, rewards) for critic in (False, True) for rewards in (0, 2)]

    def _program(self, target: Target, critic: bool, rewards: int) -> Program:
        settings = {
            **FP32,
            "critic_pretrain": critic,
            "lr_warmup_ratio": 0.2,
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 2e-3,
            **geometry(target),
        }
        return Program(operations=({"do": "prepare_set", "critic": critic, "rewards": rewards},), settings=settings)

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


@CONTRACT.add
class Streams(Clause):
    """full_parameters yields the full parameters on every rank, under their checkpoint names, tied parameters once. A
    bucket holds at most the requested number of bytes, or one larger tensor."""

    id = "SYNC-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, kind, size)
            for kind, size in [("regressor", 200), ("language", 1), ("language", 1 << 20)]
        ]

    def _program(self, target: Target, kind: str, size: int, seed: int = 9) -> Program:
        operations = (
            *trained(kind=kind, seed=seed),
            {"do": "stream", "model": "a", "bucket_bytes": size},
            {"do": "forward", "model": "a", "batch": 1},
            {"do": "stream", "model": "a", "bucket_bytes": size},
        )
        return Program(operations=operations, settings={**FP32, **geometry(target)})

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, size, seed: self._program(target, kind, size, seed), KINDS, st.integers(1, 2000), SEEDS
        )

    @override
    def check(self, execution: Execution) -> None:
        first = execution.program.operations[0]
        model = models.build(first["kind"], first["seed"])
        tied = {"head.weight"} if first["kind"] == "language" else set()
        expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        for index, operation, seen in execution.each("stream"):
            for rank, stream in enumerate(seen):
                where = f"rank {rank}, stream (operation {index})"
                self.require(
                    sorted(stream["names"]) == sorted(expected),
                    f"{where}: expected the names {sorted(expected)}, got {sorted(stream['names'])}",
                )
                for name, tensor in expected.items():
                    self.require(same(stream["values"][name], tensor), f"{where}: {name} differs from the built model")
                for sizes in stream["sizes"]:
                    self.require(
                        len(sizes) == 1 or sum(sizes) <= operation["bucket_bytes"],
                        f"{where}: expected at most {operation['bucket_bytes']} bytes per bucket, got {sum(sizes)} in {len(sizes)} tensors",
                    )
