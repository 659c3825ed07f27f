"""OPT: schedulers, weight decay, moving averages, hyperparameters that change."""

import math
from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error, same
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.buffers import assert_buffers, read_buffers
from lightrft.conformance.contract.program_parts import (
    BF16,
    SEEDS,
    micro_batch,
    program,
    trained,
    updates,
)
from lightrft.conformance.contract.reference_checks import (
    READ_STATE,
    READ_WEIGHTS,
    FollowsReference,
    assert_close,
    assert_norms,
    first_mismatch,
)


@CONTRACT.add
class Schedule(Clause):
    """The scheduler steps once per applied update. scheduler=None is allowed everywhere."""

    id = "OPT-6"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, scheduled, poisoned)
            for scheduled, poisoned in [([True, False, True], ()), ([True, False, True], (1,)), ([True] * 5, (1, 2, 3))]
        ] + [self._program(target, [True, True, False], (), sizes=(1, 3, 1))]

    def _program(
        self, target: Target, scheduled: Sequence[bool], poisoned: Sequence[int], sizes: Sequence[int] = ()
    ) -> Program:
        """``sizes``: the micro-batches of each update, which an explicit boundary ends, in place of K."""
        operations = trained(schedule=True, lr=1e-3)
        for number, pass_scheduler in enumerate(scheduled):
            poison = "nan" if number in poisoned else None
            size = sizes[number] if sizes else 2
            for index in range(size):
                operations += micro_batch(10 * number + index, scheduled=pass_scheduler, poison=poison)
                if sizes:
                    operations[-1] = {**operations[-1], "boundary": index == size - 1}
            operations.append(READ_STATE)
        return program(target, *operations, READ_WEIGHTS, accumulation_steps=2, max_skipped_updates=0)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        turns = st.lists(st.booleans(), min_size=1, max_size=4)
        return turns.flatmap(
            lambda scheduled: st.builds(
                lambda bad: self._program(target, scheduled, bad),
                st.lists(st.integers(0, len(scheduled) - 1), max_size=2),
            )
        )

    @override
    def check(self, execution: Execution) -> None:
        moved = 0
        for index, operation in enumerate(execution.program.operations):
            if operation["do"] == "step" and operation["scheduled"] and execution.predicted()[index]["applied"]:
                moved += 1
            if operation["do"] == "state":
                for rank in range(execution.target.world):
                    seen = execution.at(rank, index)
                    self.require(
                        seen["schedule"] == moved,
                        f"rank {rank}: expected the scheduler at step {moved}, got {seen['schedule']}",
                    )
                    expected_rate = 1e-3 / (1 + 0.5 * moved)
                    self.require(
                        all(math.isclose(rate, expected_rate, rel_tol=1e-9) for rate in seen["rates"]),
                        f"rank {rank}: expected the learning rate {expected_rate}, got {seen['rates']}",
                    )
        assert_close(self, execution)


@CONTRACT.add
class Decay(Clause):
    """create_optimizer applies no weight decay to biases and norms, by their names before wrapping. Parameters with requires_grad=False never
    change. Parameters may be frozen between updates, though a strategy may refuse this. A trainable parameter that gets
    no gradient on any rank is updated with a zero gradient."""

    id = "OPT-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            *(self._program(target, kind) for kind in ("regressor", "frozen", "unused", "running statistics")),
            self._program(target, "frozen", plain_adamw=True),
            self._frozen_later(target),
        ]

    def _frozen_later(self, target: Target) -> Program:
        freeze: Operation = {"do": "freeze", "model": "a", "part": "blocks.0"}
        more = [{**operation, "may_fail": True} for operation in updates(1, first=20)]
        return program(
            target, *trained(seed=8, weight_decay=10.0), *updates(2), READ_WEIGHTS, freeze, *more, READ_WEIGHTS
        )

    def _program(
        self, target: Target, kind: str, seed: int = 8, weight_decay: float = 10.0, wrap_first: bool = False,
        plain_adamw: bool = False,
    ) -> Program:  # fmt: skip
        """``plain_adamw``: with an optimizer over all parameters, including frozen ones, with the same weight decay."""
        setup = trained(kind=kind, seed=seed, weight_decay=weight_decay, wrap_first=wrap_first)
        setup = [
            {**operation, "plain_adamw": plain_adamw} if operation["do"] == "optimizer" else operation
            for operation in setup
        ]
        return program(target, *setup, *updates(3), READ_WEIGHTS)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        kinds, decays = (
            st.sampled_from(["regressor", "frozen", "unused", "language", "running statistics"]),
            st.sampled_from([0.1, 1.0, 30.0]),
        )
        return st.builds(
            lambda kind, seed, decay, first: self._program(target, kind, seed, decay, first),
            kinds,
            SEEDS,
            decays,
            st.booleans(),
        )

    @override
    def check(self, execution: Execution) -> None:
        if not list(execution.each("freeze")):
            assert_close(self, execution)
            return
        before, after = [seen for _, _, seen in execution.each("weights")]
        for rank, reported in enumerate(execution.last("step")):
            refused = is_error(reported)
            if refused:
                self.require_error(
                    reported, "StrategyError", "frozen", where=f"rank {rank}, parameters frozen between updates"
                )
            for name, tensor in after[rank].items():
                stays = refused or name.startswith("blocks.0.")
                self.require(
                    same(tensor, before[rank][name]) == stays,
                    f"rank {rank}: {name} {'changed after it was frozen' if stays else 'did not change'}",
                )


@CONTRACT.add
class RankDependentModules(Clause):
    """Ranks may use different modules in one forward. A rank that did not use a module contributes a zero gradient for
    it."""

    id = "OPT-16"
    smallest_world = 2
    capability = "rank_dependent_modules"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [program(target, *trained(kind="uneven"), *updates(3), READ_WEIGHTS, seconds=40, timeout=5.0)]

    @override
    def check(self, execution: Execution) -> None:
        assert_close(self, execution)
        assert_norms(self, execution)


@CONTRACT.add
class ChangedHyperparameters(FollowsReference):
    """Changes to the hyperparameters in the optimizer's param_groups take effect at the next update."""

    id = "PREP-9"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        values = {"lr": 1e-2, "weight_decay": 5.0, "betas": [0.1, 0.5], "eps": 1e-1}
        changes: list[Operation] = [
            {"do": "set_rate", "model": "a", "lr": 1e-2},
            {"do": "set_decay", "model": "a", "weight_decay": 5.0},
            {"do": "set_betas", "model": "a", "betas": [0.1, 0.5]},
            {"do": "set_eps", "model": "a", "eps": 1e-1},
            {"do": "set_rate", "model": "a", "lr": 1e-2, "decayed": True},
            *({"do": "set_group", "model": "a", "group": group, "values": values} for group in (0, 1)),
        ]
        return [
            program(target, *trained(), *updates(1), change, *updates(2, first=5), READ_WEIGHTS) for change in changes
        ]


@CONTRACT.add
class OptimizerSettings(FollowsReference):
    """create_optimizer creates AdamW with the learning rate, betas, eps and weight decay that it is given."""

    id = "OPT-20"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, betas=[0.5, 0.6]), self._program(target, eps=1e-2)]

    def _program(self, target: Target, **given: object) -> Program:
        build, optimizer, prepare = trained(seed=13, weight_decay=1.0)
        return program(target, build, {**optimizer, **given}, prepare, *updates(4), READ_WEIGHTS)


@CONTRACT.add
class Averages(Clause):
    """moving_average updates the average once per applied update, as the reference does, and changes nothing else. It
    averages parameters: by default, an average keeps its own buffers. Updates before an average was created do not move
    it. A model can have several averages, and beta may change from call to call. An average keeps its own dtype, also
    with bf16. It may be in a wrapper that is not marked as an actor, while the model is in one that is."""

    id = "OPT-19"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [self._program(target, 0.9, [None, None]), self._program(target, 0.5, [None, "nan", None])]
        buffers = self._program(target, 0.5, [None, None], "running statistics")
        return [*programs, buffers, self._late(target), self._late(target, wrapped=True), self._half(target)]

    def _late(self, target: Target, wrapped: bool = False) -> Program:
        """An average of other weights, made after three updates."""
        average: Operation = {"do": "average", "model": "a", "into": "ema", "beta": 0.5}
        late = [*self._copy("ema", "regressor", wrapped=wrapped), average, self.look("ema")]
        return program(
            target,
            *trained(seed=3, actor=wrapped),
            *updates(3),
            *late,
            *updates(1, first=9),
            average,
            average,
            self.look("ema"),
        )

    def _half(self, target: Target) -> Program:
        """With bf16, where the weights differ from the reference's."""
        average: Operation = {"do": "average", "model": "a", "into": "ema", "beta": 0.75}
        return program(
            target,
            *trained(seed=2),
            *self._copy("ema", "regressor"),
            *updates(1),
            READ_WEIGHTS,
            average,
            READ_WEIGHTS,
            self.look("ema"),
            precision=BF16,
        )

    def _copy(self, name: str, kind: str, **more: object) -> list[Operation]:
        build: Operation = {"do": "build", "model": name, "kind": kind, "seed": 2, **more}
        return [build, {"do": "prepare_inference", "model": name}]

    @staticmethod
    def look(model: str) -> Operation:
        """The weights of a model."""
        return {"do": "weights", "model": model}

    def _program(self, target: Target, beta: float, poisons: Sequence[str | None], kind: str = "frozen") -> Program:
        operations = [*trained(kind=kind, seed=2), *self._copy("ema", kind), *self._copy("slow", kind)]
        for number, poison in enumerate(poisons):
            for index in range(2):
                operations += micro_batch(10 * number + index, poison=poison if index else None)
                operations.append({"do": "average", "model": "a", "into": "ema", "beta": beta})
                operations.append({"do": "average", "model": "a", "into": "slow", "beta": 0.8 if number else 0.3})
        operations += [READ_WEIGHTS, self.look("ema"), self.look("slow"), read_buffers(), read_buffers("ema")]
        return program(target, *operations, accumulation_steps=2)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        poisons = st.lists(st.sampled_from([None, None, "nan"]), min_size=1, max_size=4)
        kinds = st.sampled_from(["regressor", "frozen", "language", "running statistics"])
        return st.builds(
            lambda beta, poisons, kind: self._program(target, beta, poisons, kind),
            st.sampled_from([0.0, 0.5, 0.992]),
            poisons,
            kinds,
        )

    @override
    def check(self, execution: Execution) -> None:
        if execution.program.settings["bf16"]:
            self._check_half(execution)
            return
        assert_buffers(self, execution)
        for index, operation, seen in execution.each("weights"):
            for rank, weights in enumerate(seen):
                mismatch = first_mismatch(execution, index, weights)
                self.require(mismatch is None, f"rank {rank}, model {operation['model']}: {mismatch}")

    def _check_half(self, execution: Execution) -> None:
        initial = dict(models.build("regressor", 2).named_parameters())
        for rank, (before, after, average) in enumerate(
            zip(*(seen for _, _, seen in execution.each("weights")), strict=True)
        ):
            expected = {name: 0.75 * initial[name].detach() + 0.25 * tensor for name, tensor in before.items()}
            mismatch = tolerances.absolute(average, expected)
            self.require(mismatch is None, f"rank {rank}: the average with bf16: {mismatch}")
            mismatch = tolerances.bitwise(after, before)
            self.require(mismatch is None, f"rank {rank}: moving_average changed the model: {mismatch}")
