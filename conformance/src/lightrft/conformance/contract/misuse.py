"""OPT: mistakes of the caller, and what a step says that it did."""

from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, show
from lightrft.conformance.contract.drawing import FP32, geometry, trained, updates
from lightrft.conformance.contract.near import LOOK, near, norm_fits


@CONTRACT.add
class BadLosses(Clause):
    """A loss that is not a scalar, or carries no graph, or is another model's, or an optimizer that belongs to another
    model, or a model that this strategy has not prepared, raises an error that names which."""

    id = "OPT-11"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
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
        operations = (
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
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        words = {"vector": ("loss", "scalar"), "detached": ("loss", "graph"), "number": ("loss",)}
        for rank in range(trial.place.world):
            for index, operation in enumerate(trial.program.operations):
                observed = trial.at(rank, index)
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
                        where=f"rank {rank}, {operation['do']} with the optimizer of another model",
                    )
                elif "loss_of" in operation:
                    where = f"rank {rank}, backward of the loss of another model"
                    self.require_error(observed, "StrategyError", "loss", where=where)
                elif operation["do"] == "backward" and operation["model"] == "c":
                    self.require(
                        is_error(observed), f"rank {rank}: backward of a model that is not in training raised nothing"
                    )
        near(self, trial)


@CONTRACT.add
class Adoption(Clause):
    """A strategy that does not replace parameters adopts a bare model and optimizer at first use; another one refuses
    them, and says that the model was not prepared."""

    id = "OPT-18"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        bare = [
            {"do": "build", "model": "a", "seed": 3},
            {"do": "optimizer", "model": "a", "by_hand": True, "weight_decay": 0.0},
        ]
        operations = [*bare, *updates(2), LOOK]
        return [
            Program(
                operations=tuple({**it, "may_fail": True} for it in operations), settings={**FP32, **geometry(place)}
            )
        ]

    @override
    def check(self, trial: Trial) -> None:
        if "adoption" in trial.place.capabilities:
            for _, _, seen in trial.each("step"):
                self.require(not any(map(is_error, seen)), f"a bare model was not adopted: {show(seen)}")
            near(self, trial)
        else:
            for rank, observed in enumerate(next(iter(trial.each("backward")))[2]):
                self.require_error(observed, "StrategyError", "prepare", where=f"rank {rank}, backward of a bare model")


@CONTRACT.add
class Result(Clause):
    """optimizer_step returns whether it applied, whether it skipped, and the pre-clip norm."""

    id = "OPT-12"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = [*trained(), *updates(1, 2), *updates(1, 2, first=5, poison="nan"), *updates(1, 2, first=9)]
        return [Program(operations=tuple(operations), settings={**FP32, "max_norm": 0.1, **geometry(place, 2)})]

    @override
    def check(self, trial: Trial) -> None:
        for index, _, seen in trial.each("step"):
            expected = trial.predicted()[index]
            for rank, said in enumerate(seen):
                self.require(
                    (said["applied"], said["skipped"]) == (expected["applied"], expected["skipped"]),
                    f"rank {rank}, step {index}: {show(said)}, wanted {show(expected)}",
                )
                norm = expected["grad_norm"]
                fits = said["grad_norm"] is None if norm is None else norm_fits(said["grad_norm"], norm)
                self.require(fits, f"rank {rank}, step {index}: the norm is {said['grad_norm']}, wanted {norm}")
