"""A prepared model computes what the original computed: its weights, its buffers and its mode."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, show
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.program_parts import BF16, KINDS, SEEDS, program, trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS, assert_close


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
            self._program(target, trained(kind="keyword argument", seed=5), shift=0.5),
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
class WeightsOfRank0(Clause):
    """After preparing, every rank trains the weights of rank 0, even if the ranks built different ones."""

    id = "PREP-4"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [self._program(target, first) for first in (False, True)]
        return [*programs, self._program(target, False, kind="frozen")]

    def _program(self, target: Target, wrap_first: bool, seed: int = 6, kind: str = "regressor") -> Program:
        return program(
            target,
            *trained(kind=kind, seed=seed, differ=True, wrap_first=wrap_first),
            READ_WEIGHTS,
            *updates(1),
            READ_WEIGHTS,
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
            {"do": "build", "model": "e", "kind": "running statistics", "seed": 3},
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
            target, {"do": "empty_disk"}, *trained(kind="running statistics", seed=3), *average, still, *updates(2), look, *away,
            *uses, look, *updates(1, first=9), look, READ_WEIGHTS, {"do": "empty_disk", "keep": False},
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
class MetaInit(Clause):
    """Preparing a model that was built under init_model_context(meta_init=True) gives the same model as building it
    directly. No parameter or buffer is left uninitialized. Calls of the strategy inside the context work, another
    init_model_context included."""

    id = "PREP-6"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, kind, first)
            for kind, first in (
                ("regressor", False),
                ("language", True),
                ("scaled", False),
                ("running statistics", False),
            )
        ]

    def _program(self, target: Target, kind: str, wrap_first: bool, seed: int = 7) -> Program:
        forward: Operation = {"do": "forward", "model": "a", "batch": 0}
        return program(
            target,
            *trained(kind=kind, seed=seed, meta=True, wrap_first=wrap_first),
            {"do": "uninitialized", "model": "a"},
            READ_WEIGHTS,
            forward,
            *updates(1),
            READ_WEIGHTS,
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, first, seed: self._program(target, kind, first, seed), KINDS, st.booleans(), SEEDS
        )

    @override
    def check(self, execution: Execution) -> None:
        for rank, seen in enumerate(execution.last("uninitialized")):
            self.require(not seen, f"rank {rank}: not initialised: {seen}")
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
