"""OPT: numerical parity with the reference."""

from collections.abc import Sequence
from typing import get_args

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.program_parts import BF16, micro_batch, program, trained, training, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS, assert_close, reference_weights
from lightrft.conformance.reference_model import Averaging


@CONTRACT.add
class Parity(Clause):
    """Training follows the reference over many updates. It is equal bit for bit in fp32 on the CPU at world sizes 1 and
    2 with one micro-batch per update and no clipping, for strategies that average gradients once per update and for those that
    average them in each backward pass. Otherwise it is equal within rounding."""

    id = "OPT-8"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            *(self._program(target, kind, 20, 1) for kind in ("regressor", "language")),
            self._program(target, "regressor", 10, 3),
            self._program(
                target, "regressor", 1, 1, seed=99, backwards=2
            ),  # averaging may happen between the two or after them
        ]

    def _program(
        self, target: Target, kind: str, count: int, accumulation_steps: int, seed: int = 9, backwards: int = 1
    ) -> Program:
        return program(
            target,
            *trained(kind=kind, seed=seed),
            *updates(count, accumulation_steps, first=1, backwards=backwards),
            READ_WEIGHTS,
            accumulation_steps=accumulation_steps,
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return training(target, max_norms=st.sampled_from([None, None, 1.0, 0.1]))

    @override
    def check(self, execution: Execution) -> None:
        exact = (
            execution.target.device == "cpu"
            and execution.target.world in (1, 2)
            and execution.program.settings["train_batch_size"] == 2 * execution.target.world
            and not execution.program.settings["max_norm"]
        )
        if exact:
            for rank, seen in enumerate(execution.last("weights")):
                mismatches = [
                    tolerances.bitwise(seen, reference_weights(execution, averaging))
                    for averaging in get_args(Averaging)
                ]
                mismatch = None if None in mismatches else mismatches[0]
                self.require(
                    mismatch is None, f"rank {rank}: with fp32, K = 1 and no clipping, expected equal bits: {mismatch}"
                )
        else:
            assert_close(self, execution)


@CONTRACT.add
class HalfPrecision(Clause):
    """With bf16, training follows the fp32 reference to within a tenth of the total update."""

    id = "OPT-17"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            program(target, *trained(kind=kind, seed=9), *updates(20), READ_WEIGHTS, precision=BF16)
            for kind in ("regressor", "language")
        ]

    @override
    def check(self, execution: Execution) -> None:
        first = execution.program.operations[0]
        start = dict(models.build(first["kind"], first["seed"]).named_parameters())
        mismatch = tolerances.relative(
            execution.last("weights")[0], reference_weights(execution, "per update"), start, tolerances.BF16_RELATIVE
        )
        self.require(mismatch is None, f"after 20 updates with bf16, {mismatch}")
        self.require_same_on_all_ranks(execution, "weights")


SMALL = 2.0**-9
"""A factor that bf16 rounds off when it is added to 1, and that scales a gradient exactly."""


@CONTRACT.add
class GradientPrecision(Clause):
    """With bf16, gradients are added up over micro-batches and averaged over ranks in fp32: small contributions are not
    rounded off. (In a strategy that supports it, the setting grad_accum_dtype="bf16" requests the opposite.)"""

    id = "OPT-22"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        micro_batches = 9
        alone: list[Operation] = [*micro_batch(1)[:-1], {"do": "step", "model": "a", "boundary": True}]
        added = [{**operation, "weight": SMALL} for operation in micro_batch(1)[:-1]]
        many = [*micro_batch(1), *(micro_batches - 1) * [*added, micro_batch(1)[-1]]]
        programs = [
            program(target, *self._still(kind), *alone, *many, precision=BF16, accumulation_steps=micro_batches)
            for kind in ("regressor", "language")
        ]
        return [*programs, self._ranks(target)] if target.world > 1 else programs

    def _still(self, kind: str) -> list[Operation]:
        """A model whose weights do not move."""
        return trained(kind=kind, seed=6, lr=0.0, weight_decay=0.0)

    def _ranks(self, target: Target) -> Program:
        """The same batch on all ranks, with another weight on the first."""
        update: list[Operation] = [
            {"do": "backward", "model": "a", "batch": 1, "data_of": 0, "ranks": [rank]} for rank in range(target.world)
        ]
        weighted = [
            [{**update[0], "weight": 1.0}, *({**operation, "weight": other} for operation in update[1:])]
            for other in (0.0, SMALL)
        ]
        step: Operation = {"do": "step", "model": "a"}
        return program(target, *self._still("regressor"), *weighted[0], step, *weighted[1], step, precision=BF16)

    @override
    def check(self, execution: Execution) -> None:
        norms = [seen[0]["grad_norm"] for _, _, seen in execution.each("step") if seen[0]["applied"]]
        steps = execution.program.settings["train_batch_size"] // (2 * execution.target.world)
        others = steps - 1 if steps > 1 else execution.target.world - 1
        expected = norms[0] * (1 + others * SMALL) / steps
        where = f"{steps} micro-batches" if steps > 1 else f"{execution.target.world} ranks"
        self.require(
            abs(norms[1] / expected - 1) < 0.2 * others * SMALL,
            f"one gradient and {others} of 1/512 of it, over {where}: expected the norm {expected:.6g}, got {norms[1]:.6g}",
        )


@CONTRACT.add
class MasterWeights(Clause):
    """With bf16, updates accumulate in fp32 master weights. Updates below the resolution of bf16 are not lost: after many
    of them, the weights have moved as far as the reference's, also if the model was passed in bf16."""

    id = "OPT-10"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, dtype) for dtype in ("float32", "bfloat16")]

    def _program(self, target: Target, dtype: str) -> Program:
        return program(
            target,
            *trained(seed=12, lr=1e-6, weight_decay=0.0, dtype=dtype),
            *updates(12),
            READ_WEIGHTS,
            precision=BF16,
        )

    @override
    def check(self, execution: Execution) -> None:
        first = execution.program.operations[0]
        start: tolerances.Weights = dict(models.build("regressor", first["seed"]).named_parameters())
        if first["dtype"] == "bfloat16":
            start = {name: parameter.detach().bfloat16().float() for name, parameter in start.items()}
        weights = execution.last("weights")[0]
        reference = reference_weights(execution, "per update")
        for name, initial in dict(models.build("regressor", first["seed"]).named_parameters()).items():
            expected = reference[name] - initial.detach()
            moved = weights[name] - start[name].detach()
            # Adam's step has the size of the learning rate whatever the gradient: compare sizes, because bf16 may flip signs.
            sizes = moved.abs().mean().item(), expected.abs().mean().item()
            self.require(
                0.5 * sizes[1] <= sizes[0] <= 1.5 * sizes[1],
                f"{name}: expected 12 updates of 1e-6 to move it by {sizes[1]:.3g} on average, got {sizes[0]:.3g}",
            )
