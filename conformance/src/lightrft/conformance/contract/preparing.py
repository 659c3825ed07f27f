"""PREP: preparing models."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import (
    CONTRACT,
    Clause,
    Execution,
    Operation,
    Program,
    Settings,
    Target,
    is_error,
    show,
)
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.program_parts import BF16, FP32, KINDS, SEEDS, program, trained, updates
from lightrft.conformance.contract.reference_checks import LOOK, assert_close, assert_norms

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
    """unwrap_model returns the original model, not a copy, with its class and parameter names, also from an actor and from
    a model that was compiled with torch.compile. Unwrapping twice is the same as unwrapping once."""

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
        return program(target, build, look, *prepared, look, precision=BF16)

    def _program(self, target: Target, before: Sequence[Operation], **keywords: float) -> Program:
        look: Operation = {"do": "forward", "model": "a", "batch": 3, **keywords}
        return program(target, *before, look, {**look, "batch": 4})

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
            self.require_same(before, after, f"rank {rank}: the buffers changed")
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
        programs = [self._program(target, first) for first in (False, True)]
        return [*programs, self._program(target, False, kind="frozen")]

    def _program(self, target: Target, wrap_first: bool, seed: int = 6, kind: str = "regressor") -> Program:
        return program(
            target, *trained(kind=kind, seed=seed, differ=True, wrap_first=wrap_first), LOOK, *updates(1), LOOK
        )

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
        return [
            program(
                target,
                *reference,
                *trained(seed=1),
                look,
                {"do": "forward", "model": "r", "batch": 0},
                *updates(3, first=1),
                look,
                {"do": "state_sizes", "model": "r"},
            )
        ]

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
    evaluation mode. Training, averaging, reading weights, saving, loading (save_model and load_model included) and
    offloading do not change the mode of any part: a part that a script puts in evaluation mode stays there."""

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
        more: list[Operation] = [
            {"do": "average", "model": "a", "into": "r", "beta": 0.9},
            {"do": "empty_disk"},
            {"do": "save", "model": ["a", "r"], "tag": "t"},
            {"do": "load", "model": ["a", "r"], "tag": "t"},
            *({"do": do, "model": model} for model in ("a", "r") for do in ("save_weights", "load_weights")),
            {"do": "discard_exports"},
            {"do": "empty_disk", "keep": False},
        ]
        return [
            *(
                program(target, *trained(wrap_first=first), *other, *modes, *updates(1), *away, *modes, *more, *modes)
                for first in (False, True)
            ),
            self._mixed(target, away[:3]),
        ]

    def _mixed(self, target: Target, away: Sequence[Operation]) -> Program:
        """Train with one part in evaluation mode."""
        average: list[Operation] = [
            {"do": "build", "model": "e", "kind": "tracked", "seed": 3},
            {"do": "prepare_inference", "model": "e"},
        ]
        uses: list[Operation] = [
            {"do": "average", "model": "a", "into": "e", "beta": 0.9},
            {"do": "save", "model": "a", "tag": "t"},
            {"do": "load", "model": "a", "tag": "t"},
            {"do": "save_weights", "model": "a"},
            {"do": "load_weights", "model": "a"},
            {"do": "discard_exports"},
        ]
        still: Operation = {"do": "set_mode", "model": "a", "part": "second_norm", "training": False}
        look: Operation = {"do": "evaluating", "model": "a"}
        return program(
            target, {"do": "empty_disk"}, *trained(kind="tracked", seed=3), *average, still, *updates(2), look, *away,
            *uses, look, *updates(1, first=9), look, LOOK, {"do": "empty_disk", "keep": False},
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        for index, _, seen in execution.each("evaluating"):
            self.require(
                seen == [["second_norm"]] * len(seen),
                f"evaluating (operation {index}): expected only second_norm in evaluation mode, got {seen}",
            )
        if list(execution.each("evaluating")):
            assert_close(self, execution)
        for index, operation, seen in execution.each("modes"):
            expected = operation["model"] == "a"
            self.require(
                seen == [[expected]] * len(seen),
                f"modes (operation {index}) of model {operation['model']}: expected training mode {expected} in every part, got {seen}",
            )


@CONTRACT.add
class ChangesOfTrainability(Clause):
    """requires_grad of a parameter may change between updates, also after an evaluation, a reference pass, offloading or
    torch.inference_mode: the update is that of plain torch, though a strategy may refuse parameters that are frozen at
    the update. An evaluation at any time changes no update."""

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
            for operation in [freeze, evaluate, {**freeze, "thaw": True}, *updates(1, first=update)]
        ]
        return program(target, *trained(kind=kind, seed=3, lr=1e-2), *passes, LOOK)

    def _frozen_later(self, target: Target, part: str, inference_mode: bool = False, away: bool = False) -> Program:
        """A part is frozen after an evaluation, and trains again after another; ``away``: then the model is offloaded."""
        freeze: Operation = {"do": "freeze", "model": "a", "part": part}
        evaluate: Operation = {"do": "evaluate", "model": "a", "batch": 50, "inference_mode": inference_mode}
        offload: list[Operation] = [{"do": do, "model": "a"} for do in ("offload_model", "reload_model") if away]
        later = [
            operation
            for update, thaw in ((1, False), (2, True))
            for operation in [evaluate, {**freeze, "thaw": thaw}, *offload, *updates(1, first=update)]
        ]
        later = [{**operation, "may_fail": True} for operation in later]
        return program(target, *trained(seed=4, lr=1e-2), *updates(1), *later, LOOK)

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
        return program(target, *trained(seed=5, lr=1e-2), *within, LOOK, accumulation_steps=2)

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
    """Gradient hooks that were registered on a parameter before preparing act as in plain torch, or preparing refuses the
    model and names the parameter."""

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
        later = [{**operation, "may_fail": True} for operation in [*rest, *updates(3, accumulation_steps), LOOK]]
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
class MetaInit(Clause):
    """Preparing a model that was built under init_model_context(meta_init=True) gives the same model as building it
    directly. No parameter or buffer is left uninitialized."""

    id = "PREP-6"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, kind, first)
            for kind, first in (("regressor", False), ("language", True), ("scaled", False), ("tracked", False))
        ]

    def _program(self, target: Target, kind: str, wrap_first: bool, seed: int = 7) -> Program:
        forward: Operation = {"do": "forward", "model": "a", "batch": 0}
        return program(
            target,
            *trained(kind=kind, seed=seed, meta=True, wrap_first=wrap_first),
            {"do": "uninitialized", "model": "a"},
            LOOK,
            forward,
            *updates(1),
            LOOK,
        )

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
        self, target: Target, wrap_first: bool, precision: Settings, seed: int = 8, kind: str = "regressor"
    ) -> Program:
        setup = trained(kind=kind, seed=seed, schedule=True, wrap_first=wrap_first)
        return program(target, *setup, *updates(3, scheduled=True), LOOK, precision=precision)

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


@CONTRACT.add
class Streams(Clause):
    """full_parameters yields the full parameters on every rank, under their checkpoint names, tied parameters once. A
    bucket holds at most the requested number of bytes, or one larger tensor."""

    id = "SYNC-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [
            self._program(target, kind, size)
            for kind, size in [("regressor", 200), ("language", 1), ("language", 1 << 20)]
        ]
        wider = [(FP32, "float64"), (FP32, "bfloat16"), (BF16, "float32")]
        return [
            *programs,
            *(self._program(target, "regressor", 200, precision=each, dtype=name) for each, name in wider),
        ]

    def _program(
        self, target: Target, kind: str, size: int, seed: int = 9, precision: Settings = FP32, **more: object
    ) -> Program:
        return program(
            target,
            *trained(kind=kind, seed=seed),
            {"do": "stream", "model": "a", "bucket_bytes": size, **more},
            {"do": "forward", "model": "a", "batch": 1},
            {"do": "stream", "model": "a", "bucket_bytes": size, **more},
            precision=precision,
        )

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
                dtype = getattr(torch, operation.get("dtype", "float32"))
                for name, tensor in expected.items():
                    wanted = tensor.to(dtype).float()
                    self.require_same(wanted, stream["values"][name], f"{where}: {name} differs from the built model")
                for sizes in stream["sizes"]:
                    self.require(
                        len(sizes) == 1 or sum(sizes) <= operation["bucket_bytes"],
                        f"{where}: expected at most {operation['bucket_bytes']} bytes per bucket, got {sum(sizes)} in {len(sizes)} tensors",
                    )


@CONTRACT.add
class OwnParameters(Clause):
    """A parameter belongs to one prepared model. prepare refuses a model that shares a module, a parameter or the memory of
    a parameter with a prepared model, for training and for inference, and says so. The first model trains on."""

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
            {"do": "optimizer", "model": name, "by_hand": True} for _, name in shared if name.endswith("t")
        ]
        refused: list[Operation] = [
            {"do": "prepare" if name.endswith("t") else "prepare_inference", "model": name, "may_fail": True}
            for _, name in shared
        ]
        return program(target, build, *others, *optimizers, *rest, *refused, *updates(2), LOOK)

    @override
    def check(self, execution: Execution) -> None:
        for index, operation in enumerate(execution.program.operations):
            if operation.get("may_fail"):
                for rank in range(execution.target.world):
                    where = f"rank {rank}, {operation['do']} of a model that shares a {operation['model'][:-2]}"
                    self.require_error(execution.at(rank, index), "StrategyError", "share", "parameter", where=where)
        assert_close(self, execution)


@CONTRACT.add
class OwnSaving(Clause):
    """save_pretrained of a prepared model, or of a part of it, writes the weights that save_model writes, or raises an error
    that names save_model."""

    id = "PREP-17"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        inference: list[Operation] = [
            {"do": "build", "model": "r", "kind": "llama", "seed": 2},
            {"do": "prepare_inference", "model": "r"},
        ]
        saves: list[Operation] = [
            {"do": "own_save", "model": model, "part": part, "may_fail": True}
            for model, part in (("a", ""), ("a", "model"), ("r", ""))
        ]
        discard: Operation = {"do": "discard_exports"}
        return [
            program(target, discard, *trained(kind="llama", lr=0.05), *inference, *updates(1), *saves, discard),
        ]

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("own_save"):
            where = f"save_pretrained (operation {index}) of {operation['part'] or 'the whole'} of model {operation['model']}"
            for rank, differing in enumerate(seen):
                if is_error(differing):
                    self.require_error(differing, "LightRFTError", "save_model", where=f"rank {rank}, {where}")
                else:
                    self.require(
                        not differing, f"rank {rank}, {where}: other tensors than save_model writes: {differing[:3]}"
                    )
