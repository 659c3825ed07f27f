"""PREP: preparing models."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, same, show
from lightrft.conformance.contract import compare
from lightrft.conformance.contract.drawing import BF16, FP32, KINDS, SEEDS, geometry, trained, updates
from lightrft.conformance.contract.near import LOOK, near

TRIPLE = ["tuple", "model", "optimizer", "scheduler"]
EMPTY = ["tuple", "NoneType", "NoneType", "NoneType"]


@CONTRACT.add
class Structure(Clause):
    """prepare returns what it was given, in the same order and structure: a model, (model, optimizer, scheduler), a list
    of models, None. One argument comes back bare."""

    id = "PREP-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        cases: list[list[object]] = [
            ["model"],
            ["triple"],
            [["model", "model"]],
            ["none"],
            ["empty triple", "model"],
            ["triple", "none", ["model"], "model"],
            [["model", "none"]],
        ]
        return [self._program(place, case) for case in cases]

    def _program(self, place: Place, arguments: Sequence[object]) -> Program:
        return Program(
            operations=({"do": "prepare_shapes", "arguments": list(arguments)},), settings={**FP32, **geometry(place)}
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        single = st.sampled_from(["model", "triple", "none", "empty triple"])
        many = st.lists(st.sampled_from(["model", "none"]), min_size=1, max_size=2)
        return st.lists(single | many, min_size=1, max_size=3).map(lambda found: self._program(place, found))

    @override
    def check(self, trial: Trial) -> None:
        arguments = trial.program.operations[0]["arguments"]
        wanted = [_shape(it) for it in arguments]
        for rank, seen in enumerate(trial.last("prepare_shapes")):
            found = [seen] if len(arguments) == 1 else seen[1:]
            self.require(found == wanted, f"rank {rank}: {arguments} came back as {found}")


def _shape(argument: object) -> object:
    if isinstance(argument, list):
        return ["list", *(_shape(item) for item in argument)]
    return {"model": "model", "triple": TRIPLE, "empty triple": EMPTY, "none": "NoneType"}[str(argument)]


@CONTRACT.add
class Unwrapping(Clause):
    """unwrap_model gives the model itself, of the original class and with the original parameter names, however often it
    is applied, and no copy."""

    id = "PREP-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            self._program(place, [*trained()], 1),
            self._program(place, [*trained(actor=True, kind="language")], 3),
            *(
                self._program(
                    place, [{"do": "build", "model": "a", "kind": kind}, {"do": "prepare_inference", "model": "a"}], 2
                )
                for kind in ("regressor", "language")
            ),
            self._program(place, [{"do": "build", "model": "a"}], 1),
        ]

    def _program(self, place: Place, before: Sequence[Operation], times: int) -> Program:
        return Program(
            operations=(*before, {"do": "unwrapped", "model": "a", "times": times}),
            settings={**FP32, **geometry(place)},
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, actor, first, times: self._program(place, trained(kind=kind, actor=actor, wrap_first=first), times),
            KINDS, st.booleans(), st.booleans(), st.integers(1, 4),
        )  # fmt: skip

    @override
    def check(self, trial: Trial) -> None:
        kind = trial.program.operations[0].get("kind", "regressor")
        names = [name for name, _ in models.build(kind, 0).named_parameters()]
        for rank, seen in enumerate(trial.last("unwrapped")):
            self.require(seen["is_own"], f"rank {rank}: unwrap_model gave another class")
            self.require(seen["names"] == names, f"rank {rank}: its parameters are {seen['names']}, wanted {names}")
            self.require(seen["is_it"], f"rank {rank}: unwrap_model gave another object the second time")
            self.require(seen["shares"], f"rank {rank}: its parameters are not those of the model that is called")


@CONTRACT.add
class SameFunction(Clause):
    """A prepared model computes what the bare one did, whatever it is called with (fp32: 1e-6). Its buffers keep their
    values and types, with bf16 too."""

    id = "PREP-3"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        inference: list[Operation] = [
            {"do": "build", "model": "a", "kind": "language", "seed": 5},
            {"do": "prepare_inference", "model": "a"},
        ]
        return [
            self._program(place, trained(seed=5)),
            self._program(place, inference),
            self._program(place, trained(kind="language", seed=5, actor=True)),
            self._program(place, trained(kind="shifted", seed=5), shift=0.5),
            *(self._buffers(place, training) for training in (True, False)),
        ]

    def _buffers(self, place: Place, training: bool) -> Program:
        build, *rest = trained(kind="scaled", seed=5)
        look: Operation = {"do": "buffers", "model": "a"}
        prepared = [*rest, *updates(1)] if training else [{"do": "prepare_inference", "model": "a"}]
        return Program(operations=(build, look, *prepared, look), settings={**BF16, **geometry(place)})

    def _program(self, place: Place, before: Sequence[Operation], **keywords: float) -> Program:
        look: Operation = {"do": "forward", "model": "a", "batch": 3, **keywords}
        return Program(operations=(*before, look, {**look, "batch": 4}), settings={**FP32, **geometry(place)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, seed, first: self._program(place, trained(kind=kind, seed=seed, wrap_first=first)),
            KINDS,
            SEEDS,
            st.booleans(),
        )

    @override
    def check(self, trial: Trial) -> None:
        looks = [seen for _, _, seen in trial.each("buffers")]
        for rank, (before, after) in enumerate(zip(*looks, strict=True) if looks else ()):
            self.require(same(before, after), f"rank {rank}: the buffers were {show(before)}, and are {show(after)}")
        for index, _, seen in trial.each("forward"):
            for rank, (found, wanted) in enumerate(zip(seen, trial.predicted()[index], strict=True)):
                worst = (found - wanted).abs().max().item()
                self.require(worst <= 1e-6, f"rank {rank}: the outputs differ by {worst:.3g}")


@CONTRACT.add
class OneModel(Clause):
    """After preparing, every rank trains the same weights, even if ranks built theirs differently: rank 0's."""

    id = "PREP-4"
    smallest_world = 2

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, first) for first in (False, True)]

    def _program(self, place: Place, wrap_first: bool, seed: int = 6, kind: str = "regressor") -> Program:
        operations = (*trained(kind=kind, seed=seed, differ=True, wrap_first=wrap_first), LOOK, *updates(1), LOOK)
        return Program(operations=operations, settings={**FP32, **geometry(place)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(lambda first, seed, kind: self._program(place, first, seed, kind), st.booleans(), SEEDS, KINDS)

    @override
    def check(self, trial: Trial) -> None:
        first = next(iter(trial.each("weights")))
        for rank, seen in enumerate(first[2]):
            fault = compare.bitwise(seen, trial.predicted()[first[0]])
            self.require(fault is None, f"rank {rank} does not begin with rank 0's weights: {fault}")
        near(self, trial)


@CONTRACT.add
class Inference(Clause):
    """Models prepared for inference get no optimizer state and never change."""

    id = "PREP-5"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
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
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        before, after = [seen for _, _, seen in trial.each("weights")]
        for rank in range(trial.place.world):
            fault = compare.bitwise(after[rank], before[rank])
            self.require(fault is None, f"rank {rank}: a model prepared for inference changed: {fault}")
        self.require(
            trial.last("state_sizes") == [0] * trial.place.world, "a model prepared for inference has optimizer state"
        )


@CONTRACT.add
class Modes(Clause):
    """A model prepared for training is in training mode, dropout at work, as it was built; one prepared for inference is
    in evaluation mode. Training, looking at weights and offloading change neither."""

    id = "PREP-10"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        other: list[Operation] = [
            it for name, listed in [("r", False), ("s", True)]
            for it in ({"do": "build", "model": name, "seed": 2}, {"do": "prepare_inference", "model": name, "listed": listed})
        ]  # fmt: skip
        modes: list[Operation] = [{"do": "modes", "model": model} for model in "ars"]
        away: list[Operation] = [
            {"do": do, "model": model} for model in ("a", "r") for do in ("weights", "offload_model", "reload_model")
        ]
        return [
            Program(
                operations=(*trained(wrap_first=first), *other, *modes, *updates(1), *away, *modes),
                settings={**FP32, **geometry(place)},
            )
            for first in (False, True)
        ]

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("modes"):
            wanted = operation["model"] == "a"
            self.require(
                seen == [[wanted]] * len(seen),
                f"modes (operation {index}): {operation['model']} is in training mode: {seen}, wanted {wanted}",
            )


@CONTRACT.add
class MetaInit(Clause):
    """init_model_context(meta_init=True) and then preparing gives the same model as building it directly; no parameter
    or buffer is left uninitialised."""

    id = "PREP-6"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        kinds = [("regressor", False), ("language", True), ("scaled", False)]
        return [self._program(place, kind, first) for kind, first in kinds]

    def _program(self, place: Place, kind: str, wrap_first: bool, seed: int = 7) -> Program:
        forward: Operation = {"do": "forward", "model": "a", "batch": 0}
        operations = (
            *trained(kind=kind, seed=seed, meta=True, wrap_first=wrap_first),
            {"do": "uninitialised", "model": "a"},
            LOOK,
            forward,
            *updates(1),
            LOOK,
        )
        return Program(operations=operations, settings={**FP32, **geometry(place)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(lambda kind, first, seed: self._program(place, kind, first, seed), KINDS, st.booleans(), SEEDS)

    @override
    def check(self, trial: Trial) -> None:
        for rank, seen in enumerate(trial.last("uninitialised")):
            self.require(not seen, f"rank {rank}: uninitialised are {seen}")
        index, _, seen = next(iter(trial.each("weights")))
        for rank, weights in enumerate(seen):
            fault = compare.bitwise(weights, trial.predicted()[index])
            self.require(fault is None, f"rank {rank}: not the model that rank 0 built: {fault}")
        index, _, outputs = next(iter(trial.each("forward")))
        for rank, (found, wanted) in enumerate(zip(outputs, trial.predicted()[index], strict=True)):
            self.require(
                torch.allclose(found, wanted, atol=1e-6),
                f"rank {rank}: it computes {show(found)}, wanted {show(wanted)}",
            )
        near(self, trial)


@CONTRACT.add
class OnePath(Clause):
    """One path works in every strategy: build the model, create_optimizer, build the schedule, prepare. prepare gives
    back the caller's own optimizer and scheduler objects. Wrapping first and creating the optimizer afterwards works
    everywhere too, and comes to the same."""

    id = "PREP-8"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, first, precision) for first in (False, True) for precision in (FP32, BF16)]

    def _program(
        self, place: Place, wrap_first: bool, precision: object, seed: int = 8, kind: str = "regressor"
    ) -> Program:
        settings = {**(BF16 if precision is BF16 else FP32), **geometry(place)}
        operations = (
            *trained(kind=kind, seed=seed, schedule=True, wrap_first=wrap_first),
            *updates(3, scheduled=True),
            LOOK,
        )
        return Program(operations=operations, settings=settings)

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda first, seed, kind: self._program(place, first, FP32, seed, kind), st.booleans(), SEEDS, KINDS
        )

    @override
    def check(self, trial: Trial) -> None:
        for _, _, seen in trial.each("prepare"):
            for rank, said in enumerate(seen):
                self.require(
                    all(said.values()), f"rank {rank}: prepare did not give back the caller's own objects: {said}"
                )
        if not trial.program.settings["bf16"]:
            near(self, trial)
        else:
            self.require(
                all(it["applied"] for _, _, seen in trial.each("step") for it in seen), "an update was not applied"
            )


@CONTRACT.add
class WholeSet(Clause):
    """prepare_models_and_optimizers returns ((actor, optimizer, scheduler), (critic, optimizer, scheduler),
    reward_models, initial_model), with None where there is no critic; actor and critic have rates of their own."""

    id = "PREP-7"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, critic, rewards) for critic in (False, True) for rewards in (0, 2)]

    def _program(self, place: Place, critic: bool, rewards: int) -> Program:
        settings = {
            **FP32,
            "critic_pretrain": critic,
            "lr_warmup_ratio": 0.2,
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 2e-3,
            **geometry(place),
        }
        return Program(operations=({"do": "prepare_set", "critic": critic, "rewards": rewards},), settings=settings)

    @override
    def check(self, trial: Trial) -> None:
        asked = trial.program.operations[0]
        rewards = ["list", *["model"] * asked["rewards"]] if asked["rewards"] else "NoneType"
        wanted = ["tuple", TRIPLE, TRIPLE if asked["critic"] else EMPTY, rewards, "model"]
        for rank, seen in enumerate(trial.last("prepare_set")):
            self.require(seen["structure"] == wanted, f"rank {rank}: it returned {seen['structure']}, wanted {wanted}")
            self.require(seen["rate"] == 0.0, f"rank {rank}: warm-up begins at {seen['rate']}, wanted 0")
            peaks = [1e-3, 2e-3] if asked["critic"] else [1e-3]
            self.require(seen["peaks"] == peaks, f"rank {rank}: the rates rise to {seen['peaks']}, wanted {peaks}")


@CONTRACT.add
class Streams(Clause):
    """full_parameters yields the whole parameters under the names of a checkpoint, tied ones once, in buckets of at most
    the bytes asked for or one larger tensor, on every rank."""

    id = "SYNC-7"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            self._program(place, kind, size)
            for kind, size in [("regressor", 200), ("language", 1), ("language", 1 << 20)]
        ]

    def _program(self, place: Place, kind: str, size: int, seed: int = 9) -> Program:
        operations = (
            *trained(kind=kind, seed=seed),
            {"do": "stream", "model": "a", "bucket_bytes": size},
            {"do": "forward", "model": "a", "batch": 1},
            {"do": "stream", "model": "a", "bucket_bytes": size},
        )
        return Program(operations=operations, settings={**FP32, **geometry(place)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda kind, size, seed: self._program(place, kind, size, seed), KINDS, st.integers(1, 2000), SEEDS
        )

    @override
    def check(self, trial: Trial) -> None:
        first = trial.program.operations[0]
        model = models.build(first["kind"], first["seed"])
        tied = {"head.weight"} if first["kind"] == "language" else set()
        wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        for index, operation, seen in trial.each("stream"):
            for rank, found in enumerate(seen):
                where = f"rank {rank}, stream (operation {index})"
                self.require(
                    sorted(found["names"]) == sorted(wanted),
                    f"{where}: names {sorted(found['names'])}, wanted {sorted(wanted)}",
                )
                for name, tensor in wanted.items():
                    self.require(same(found["values"][name], tensor), f"{where}: {name} is not what it was")
                for sizes in found["sizes"]:
                    self.require(
                        len(sizes) == 1 or sum(sizes) <= operation["bucket_bytes"],
                        f"{where}: a bucket of {sum(sizes)} bytes in {len(sizes)} tensors",
                    )
