"""Crashes, full disks, damaged files, and malicious files."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import (
    CONTRACT,
    Execution,
    Operation,
    Program,
    Target,
)
from lightrft.conformance.contract.checkpoints.on_disk import (
    FINGERPRINT,
    REMOVE_DISK,
    OnDisk,
    loaded,
    saved,
)
from lightrft.conformance.contract.program_parts import trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS

REPLACING = 0.5
"""The fraction of its changes on disk after which LightRFT's save has moved the replaced checkpoint, but not yet the new one."""
DAMAGES: list[tuple[str, float, int]] = [
    ("flip", 0.0, 0), ("flip", 0.01, 3), ("flip", 0.5, 7), ("flip", 0.999, 1), ("truncate", 0.5, 0),
    ("truncate", 0.999, 0), ("truncate", 0.0, 0), ("remove", 0.0, 0), ("flip in optimizer", 0.0, 2),
]  # fmt: skip


@CONTRACT.add
class KilledWhileSaving(OnDisk):
    """If any rank is killed at any time, even while it replaces a checkpoint of the same tag, the last committed
    checkpoint still loads. A partially written checkpoint is never loaded, and the next save removes it."""

    id = "CKPT-5"
    ends_workers = True

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            self._program(target, 0.4, [target.world - 1]),
            self._program(target, 0.8, [0]),
            self._program(target, 1.0, [0], asynchronous=target.world > 1),
            self._program(target, REPLACING, [0], tags=("same", "same")),
        ]

    def _program(
        self, target: Target, part: float, ranks: list[int], asynchronous: bool = False,
        tags: tuple[str, str] = ("one", "two"),
    ) -> Program:  # fmt: skip
        """Save, train, and be killed while saving and rotating. Loading waits for an asynchronous save."""
        first, second = tags
        begin = saved("zero" if first != second else first), loaded("zero" if first != second else first)
        program = self.program(
            target, *trained(), *begin, *updates(1), {"do": "record_weights", "model": "a", "name": "one"},
            {"do": "count_changes"}, saved(first, max_num=1), loaded(first), *updates(1, first=5),
            {"do": "record_weights", "model": "a", "name": "two"}, {"do": "kill_within", "part": part, "ranks": ranks},
            saved(second, max_num=1, may_fail=True), {"do": "close", "may_fail": True},
            {"do": "exit_process", "ranks": list(range(target.world))}, async_ckpt=asynchronous,
        )  # fmt: skip
        after = (
            *trained(seed=9), {"do": "visible_names"}, loaded(None), {"do": "recorded_weights", "model": "a"}, saved("three"),
            loaded("three"), {"do": "hidden_names"}, REMOVE_DISK,
        )  # fmt: skip
        return replace(program, operations=program.operations[:-1], afterwards=replace(program, operations=after))

    @override
    def check(self, execution: Execution) -> None:
        after = execution.afterwards
        assert after is not None
        after.at(0, len(after.program.operations) - 1)
        names, path = after.last("visible_names")[0], after.last_of("load", 0)[0]["path"]
        newest = ["two"] if "two" in names else ["one"]
        if any("same" in name for name in names):
            newest = ["one", "two"]
        else:
            self.require(path == f"s/{newest[0]}", f"of {names}, expected s/{newest[0]} to be loaded, got {path}")
        for rank, recorded in enumerate(after.last("recorded_weights")):
            self.require(
                recorded in [[name] for name in newest],
                f"rank {rank}: expected the weights recorded as {' or '.join(newest)}, got those of {recorded}",
            )
        left = after.last("hidden_names")[0]
        self.require(not left, f"after the next save, expected no partial checkpoint, got {', '.join(left)}")


@CONTRACT.add
class DamagedFiles(OnDisk):
    """Loading detects a flipped bit, a truncated file and a missing file, and raises a CheckpointError that names the
    file before any state changes."""

    id = "CKPT-6"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, [(*damage, file) for damage in DAMAGES]) for file in range(target.world + 1)]

    def _program(self, target: Target, damages: Sequence[tuple[str, float, int, int]]) -> Program:
        attempts: list[Operation] = []
        for number, (what, at, bit, file) in enumerate(damages):
            damage: Operation = {
                "do": "damage",
                "what": what,
                "at": at,
                "bit": bit,
                "file": file,
                "store": f"s{number}",
            }
            attempt = loaded("t", store=f"s{number}", may_fail=True)
            attempts += [
                saved(store=f"s{number}"),
                *updates(1, first=number),
                damage,
                FINGERPRINT,
                attempt,
                FINGERPRINT,
            ]
        return self.program(target, *trained(), *updates(1), *attempts)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        one = st.tuples(
            st.sampled_from(["flip", "flip", "truncate", "remove"]), st.floats(0, 1, exclude_max=True), st.integers(0, 7),
            st.integers(0, target.world),
        )  # fmt: skip
        return st.builds(lambda damages: self._program(target, damages), st.lists(one, min_size=1, max_size=4))

    @override
    def check(self, execution: Execution) -> None:
        prints = [seen for _, _, seen in execution.each("fingerprint")]
        damaged = [(operation, seen[0]) for _, operation, seen in execution.each("damage")]
        for number, (index, _, _) in enumerate(execution.each("load")):
            damage, name = damaged[number]
            where = f"loading after {damage['what']} at {damage['at']} of {name}"
            for error in self.errors(execution, index):
                self.require_error(error, "CheckpointError", name, where=where)
            self.require_same(prints[2 * number], prints[2 * number + 1], f"{where}: state changed")


@CONTRACT.add
class NoCodeExecution(OnDisk):
    """Loading executes no code from the checkpoint, whichever of its files is replaced or added."""

    id = "CKPT-10"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        each = self.program(target, *trained(), saved(), {"do": "load_poisoned", "model": "a"})
        return [each, *(self._all(target, replace) for replace in (True, False))]

    def _all(self, target: Target, replace: bool) -> Program:
        plant: Operation = {"do": "plant_pickles", "replace": replace}
        return self.program(target, *trained(), saved(), plant, loaded(may_fail=True), {"do": "pickle_executed"})

    @override
    def check(self, execution: Execution) -> None:
        poisoned = [seen for _, _, seen in execution.each("load_poisoned")]
        for rank, executed in enumerate(poisoned[0] if poisoned else ()):
            self.require(bool(executed), f"rank {rank}: expected files in the checkpoint, got none")
            names = [name for name, was_executed in executed.items() if was_executed]
            self.require(not names, f"rank {rank}: loading executed a pickle in the place of {', '.join(names)}")
        if poisoned:
            return
        self.require(not any(execution.last("pickle_executed")), "loading executed a pickle from the checkpoint")
        if execution.program.operations[-4]["replace"]:
            self.errors(execution, len(execution.program.operations) - 3)


@CONTRACT.add
class FailedWrite(OnDisk):
    """A full disk or a refused write on one rank raises on all ranks. Checkpoints that were committed earlier remain,
    including the one that the failed save was replacing."""

    id = "CKPT-11"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            *(self._program(target, rank, False) for rank in range(target.world)),
            self._program(target, 0, True),
            *(self._program(target, target.world - 1, asynchronous, "t") for asynchronous in (False, True)),
        ]

    def _program(self, target: Target, rank: int, asynchronous: bool, tag: str = "u") -> Program:
        refuse: Operation = {"do": "refuse_writes", "ranks": [rank]}
        failing = saved(tag, may_fail=not asynchronous)
        waiting = [saved("v", may_fail=True)] if asynchronous else []
        return self.program(
            target, *trained(), *updates(1), saved(), loaded(), READ_WEIGHTS, *updates(1, first=4), refuse, failing, *waiting,
            {"do": "allow_writes"}, {"do": "visible_names"}, loaded(None), READ_WEIGHTS, async_ckpt=asynchronous,
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        operations = execution.program.operations
        last = max(index for index, operation in enumerate(operations) if operation.get("may_fail"))
        for error in self.errors(execution, last):
            self.require_error(
                error, "CheckpointError", "safetensors", where="saving while the system refuses to write"
            )
        self.require(
            execution.last("visible_names")[0] == ["t"],
            f"after a refused save, expected only t, got {execution.last('visible_names')[0]}",
        )
        one, other = (seen for _, _, seen in execution.each("weights"))
        self.require_same(one, other, "the checkpoint committed earlier was not loaded")
