"""Which checkpoints load, and what is loaded of them."""

from collections.abc import Sequence
from typing import ClassVar

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import (
    CONTRACT,
    Execution,
    Operation,
    Program,
    Record,
    Target,
)
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.checkpoints.on_disk import (
    OnDisk,
    loaded,
    saved,
)
from lightrft.conformance.contract.data import interleaved
from lightrft.conformance.contract.program_parts import SEEDS, trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS

SAMPLES = 60
REST: Operation = {"do": "rest_of_epoch", "name": "l"}


@CONTRACT.add
class PortableCheckpoints(OnDisk):
    """There is one checkpoint format: any strategy at any world size loads what any other saved, and training continues
    within the parity tolerances, with the remaining samples of the epoch in the same order. (This clause runs
    FakeStrategy in one process, in both directions; the nox session `checkpoints` runs all combinations.)"""

    id = "CKPT-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._out(target), self._in(target)]

    def _setup(self, kind: str, seed: int) -> list[Operation]:
        loader: Operation = {"do": "loader", "name": "l", "samples": SAMPLES, "batch_size": 2}
        return [*trained(kind=kind, seed=seed), loader]

    def _out(self, target: Target, kind: str = "regressor", seed: int = 3) -> Program:
        share: Operation = {"do": "train_shared", "model": "a", "first": 0, "count": 3}
        more: Operation = {"do": "train_shared", "model": "a", "first": 3, "count": 3}
        other: Operation = {
            "do": "on_fake_strategy",
            "kind": kind,
            "seed": seed + 1,
            "first": 3,
            "count": 3,
            "load_from": "s",
            "samples": SAMPLES,
        }
        partial_epoch: Operation = {"do": "batches", "name": "l", "epoch": 1, "first": 2}
        return self.program(
            target,
            *self._setup(kind, seed),
            READ_WEIGHTS,
            share,
            partial_epoch,
            saved(),
            more,
            READ_WEIGHTS,
            REST,
            other,
        )

    def _in(self, target: Target, kind: str = "regressor", seed: int = 3) -> Program:
        fake: Operation = {"do": "on_fake_strategy", "kind": kind, "seed": seed, "samples": SAMPLES, "batches": 3}
        begin, uninterrupted = {**fake, "count": 3, "save_to": "s"}, {**fake, "count": 6}
        more: Operation = {"do": "train_shared", "model": "a", "first": 3, "count": 3}
        return self.program(
            target, *self._setup(kind, seed + 1), READ_WEIGHTS, begin, loaded(), more, READ_WEIGHTS, REST, uninterrupted
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        kinds = st.sampled_from(["regressor", "language", "frozen", "unused"])
        return st.one_of(
            st.builds(lambda kind, seed: self._out(target, kind, seed), kinds, SEEDS),
            st.builds(lambda kind, seed: self._in(target, kind, seed), kinds, SEEDS),
        )

    @override
    def check(self, execution: Execution) -> None:
        start, end = (seen[0] for _, _, seen in execution.each("weights"))
        other = execution.last("on_fake_strategy")[0]["weights"]
        mismatch = tolerances.relative(end, other, start, tolerances.OTHER_SUMMATION_ORDER)
        self.require(
            mismatch is None, f"FakeStrategy and this strategy continue differently from one checkpoint: {mismatch}"
        )
        self.require_same_on_all_ranks(execution, "weights")
        rest = interleaved([{"batches": batches} for batches in execution.last("rest_of_epoch")])
        expected = execution.last("on_fake_strategy")[0]["rest"]
        self.require(
            bool(rest) and rest == expected[: len(rest)],
            f"expected the samples that FakeStrategy has left, {expected}, or as many as fill the batches of all ranks, got {rest}",
        )


@CONTRACT.add
class SelectiveLoading(OnDisk):
    """load_module_strict, load_optimizer_states, load_lr_scheduler_states and load_module_only each do exactly what the
    name says."""

    id = "CKPT-8"

    OPTIONS: ClassVar[list[Record]] = [
        {"load_optimizer_states": False},
        {"load_lr_scheduler_states": False},
        {"load_module_only": True},
        {},
    ]

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._options(target), self._strict(target)]

    def _options(self, target: Target) -> Program:
        states: list[Operation] = [{"do": "state", "model": "a"}, {"do": "random_state"}]
        attempts: list[Operation] = []
        for number, option in enumerate(self.OPTIONS):
            attempts += [
                *updates(1, first=number + 10, scheduled=True),
                {"do": "draw"},
                *states,
                loaded(**option),
                *states,
                saved(None, store="numbers"),
            ]
        setup = [*trained(schedule=True), *updates(2, scheduled=True), *states, saved()]
        return self.program(target, *setup, *attempts)

    def _strict(self, target: Target) -> Program:
        other = trained("b", "unused", seed=4)
        more = {"load_module_only": True, "may_fail": True}
        strict: Operation = {"do": "load", "model": "b", "tag": "t", **more}
        lenient: Operation = {
            "do": "load",
            "model": "b",
            "tag": "t",
            "load_module_only": True,
            "load_module_strict": False,
        }
        look: Operation = {"do": "weights", "model": "b"}
        return self.program(target, *trained(), saved(), READ_WEIGHTS, *other, look, strict, look, lenient, look)

    @override
    def check(self, execution: Execution) -> None:
        if list(execution.each("random_state")):
            self._check_options(execution)
        else:
            self._check_strict(execution)

    def _check_options(self, execution: Execution) -> None:
        for rank in range(execution.target.world):
            states = [seen[rank] for _, _, seen in execution.each("state")]
            streams = [seen[rank] for _, _, seen in execution.each("random_state")]
            for number, option in enumerate(self.OPTIONS):
                before, after = states[1 + 2 * number : 3 + 2 * number]
                random = streams[1 + 2 * number : 3 + 2 * number]
                module_only = option.get("load_module_only", False)
                kept = {
                    "parameters": False,
                    "optimizer": module_only or option.get("load_optimizer_states") is False,
                    "schedule": module_only or option.get("load_lr_scheduler_states") is False,
                    "rates": module_only or option.get("load_optimizer_states") is False,
                }
                for what, stays in kept.items():
                    wanted = before[what] if stays else states[0][what]
                    self.require_same(
                        wanted,
                        after[what],
                        f"rank {rank}: {option or 'by default'}: expected {what} to be as {'before loading' if stays else 'saved'}",
                    )
                wanted = random[0] if module_only else streams[0]
                self.require(
                    random[1] == wanted,
                    f"rank {rank}: {option or 'by default'}: expected the random state to be as {'before loading' if module_only else 'saved'}",
                )
                path, updates_made = execution.last_of("save", 1 + number)[rank]["path"], 3 if module_only else 2
                self.require(
                    path == f"numbers/global_step{updates_made}",
                    f"rank {rank}: {option or 'by default'}: after {updates_made} updates, expected the path numbers/global_step{updates_made}, got {path}",
                )

    def _check_strict(self, execution: Execution) -> None:
        index = next(i for i, operation in enumerate(execution.program.operations) if operation.get("may_fail"))
        for error in self.errors(execution, index):
            self.require_error(error, "CheckpointError", "spare", where="loading a model with more parameters")
        source, *looks = (seen[0] for _, _, seen in execution.each("weights"))
        self.require_same(looks[0], looks[1], "a load that raised changed weights")
        for name, tensor in looks[2].items():
            wanted = source.get(name, looks[0][name])
            self.require_same(wanted, tensor, f"load_module_strict=False: {name} is neither loaded nor unchanged")
