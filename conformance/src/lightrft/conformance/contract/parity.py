"""OPT: the numbers, against the reference."""

from collections.abc import Sequence
from typing import get_args

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Place, Program, Trial
from lightrft.conformance.contract import compare
from lightrft.conformance.contract.drawing import BF16, FP32, geometry, trained, training, updates
from lightrft.conformance.contract.near import LOOK, near, reference_weights
from lightrft.conformance.reference import Family


@CONTRACT.add
class Parity(Clause):
    """Training follows the reference over many updates: bit for bit in fp32 on the CPU with K = 1 and clipping
    inactive, at world sizes 1 and 2, whether ranks are averaged once an update or at each backward; else within
    rounding."""

    id = "OPT-8"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            *(self._program(place, kind, 20, 1) for kind in ("regressor", "language")),
            self._program(place, "regressor", 10, 3),
            self._program(place, "regressor", 1, 1, seed=99, backwards=2),  # ranks are averaged between them, or after
        ]

    def _program(self, place: Place, kind: str, count: int, window: int, seed: int = 9, backwards: int = 1) -> Program:
        operations = (*trained(kind=kind, seed=seed), *updates(count, window, first=1, backwards=backwards), LOOK)
        return Program(operations=operations, settings={**FP32, **geometry(place, window)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return training(place, max_norms=st.sampled_from([None, None, 1.0, 0.1]))

    @override
    def check(self, trial: Trial) -> None:
        exact = (
            trial.place.device == "cpu"
            and trial.place.world in (1, 2)
            and trial.program.settings["train_batch_size"] == 2 * trial.place.world
            and not trial.program.settings["max_norm"]
        )
        if exact:
            for rank, seen in enumerate(trial.last("weights")):
                faults = [compare.bitwise(seen, reference_weights(trial, family)) for family in get_args(Family)]
                fault = None if None in faults else faults[0]
                self.require(fault is None, f"rank {rank}: fp32, K = 1, no clipping must be exact, and {fault}")
        else:
            near(self, trial)


@CONTRACT.add
class HalfPrecision(Clause):
    """With bf16, training follows the fp32 reference within a tenth of the update."""

    id = "OPT-17"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            Program(operations=(*trained(kind=kind, seed=9), *updates(20), LOOK), settings={**BF16, **geometry(place)})
            for kind in ("regressor", "language")
        ]

    @override
    def check(self, trial: Trial) -> None:
        first = trial.program.operations[0]
        start = dict(models.build(first["kind"], first["seed"]).named_parameters())
        fault = compare.relative(
            trial.last("weights")[0], reference_weights(trial, "once"), start, compare.BF16_RELATIVE
        )
        self.require(fault is None, f"after 20 updates in bf16 {fault}")
        self.require_alike(trial, "weights")


@CONTRACT.add
class MasterWeights(Clause):
    """With bf16 updates accumulate in fp32 master weights: many updates below bf16's resolution still move the model as
    the reference says, also where the model was given in bf16."""

    id = "OPT-10"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, dtype) for dtype in ("float32", "bfloat16")]

    def _program(self, place: Place, dtype: str) -> Program:
        operations = (*trained(seed=12, lr=1e-6, weight_decay=0.0, dtype=dtype), *updates(12), LOOK)
        return Program(operations=operations, settings={**BF16, **geometry(place)})

    @override
    def check(self, trial: Trial) -> None:
        first = trial.program.operations[0]
        start: compare.Weights = dict(models.build("regressor", first["seed"]).named_parameters())
        if first["dtype"] == "bfloat16":
            start = {name: parameter.detach().bfloat16().float() for name, parameter in start.items()}
        weights = trial.last("weights")[0]
        reference = reference_weights(trial, "once")
        for name, begun in dict(models.build("regressor", first["seed"]).named_parameters()).items():
            expected = reference[name] - begun.detach()
            moved = weights[name] - start[name].detach()
            # Adam's step has the size of the rate whatever the gradient is: compare sizes, since bf16 may turn signs.
            sizes = moved.abs().mean().item(), expected.abs().mean().item()
            self.require(
                0.5 * sizes[1] <= sizes[0] <= 1.5 * sizes[1],
                f"{name} moved by {sizes[0]:.3g} on average in 12 updates of 1e-6, wanted {sizes[1]:.3g}",
            )
