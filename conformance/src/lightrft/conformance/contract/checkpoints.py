"""CKPT: checkpoints."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import (
    CONTRACT,
    Clause,
    Execution,
    Operation,
    Program,
    Record,
    Settings,
    Target,
    is_error,
    show,
)
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.data import interleaved
from lightrft.conformance.contract.program_parts import BF16, FP32, SEEDS, program, trained, updates

EMPTY: Operation = {"do": "empty_disk"}
DONE: Operation = {"do": "empty_disk", "keep": False}
AGAIN: Operation = {"do": "restart"}
PRINT: Operation = {"do": "fingerprint"}
LOOK: Operation = {"do": "weights", "model": "a"}


def saved(tag: str | None = "t", **more: object) -> Operation:
    """save_ckpt of model a."""
    return {"do": "save", "model": "a", "tag": tag, **more}


def loaded(tag: str | None = "t", **more: object) -> Operation:
    """load_ckpt of model a."""
    return {"do": "load", "model": "a", "tag": tag, **more}


class OnDisk(Clause):
    """A clause whose programs start and end with an empty disk."""

    def program(self, target: Target, *operations: Operation, accumulation_steps: int = 1, **settings: Any) -> Program:
        """A program of ``operations``, with updates of ``accumulation_steps`` micro-batches."""
        return program(target, EMPTY, *operations, DONE, accumulation_steps=accumulation_steps, **settings)

    def errors(self, execution: Execution, index: int) -> list[Record]:
        """The errors of all ranks in an operation that must fail on every rank."""
        seen = [execution.at(rank, index) for rank in range(execution.target.world)]
        for rank, observed in enumerate(seen):
            self.require(is_error(observed), f"rank {rank}, operation {index}: expected an error, got {show(observed)}")
        return seen


@CONTRACT.add
class ExactResume(OnDisk):
    """Resuming is exact: training, saving and training on gives the same result, bit for bit, as loading and training
    on. This covers the model, optimizer, scheduler, step and skip counters, moving averages, all random states and the
    data position, and each rank's own buffers. A resumable checkpoint is taken between updates: saving raises while gradients are pending. Weights
    alone can be saved at any time."""

    id = "CKPT-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [self._resume(target), self._pending(target), self._last_skip(target), self._back(target)]
        programs.append(self._resume(target, kind="tracked"))
        return [*programs, self._resume(target, BF16)] if target.world == 1 else programs

    def _resume(
        self,
        target: Target,
        precision: Settings = FP32,
        kind: str = "regressor",
        seed: int = 1,
        before: int = 3,
        after: int = 2,
    ) -> Program:
        setup: list[Operation] = [
            *trained(kind=kind, seed=seed, schedule=True),
            {"do": "build", "model": "e", "kind": kind, "seed": seed},
            {"do": "prepare_inference", "model": "e"},
            {"do": "loader", "name": "l", "samples": 40, "batch_size": 2},
            {"do": "loader", "name": "m", "samples": 30, "batch_size": 1},
        ]
        averaging: Operation = {"do": "average", "model": "a", "into": "e", "beta": 0.9}
        first: list[Operation] = [
            *({"do": "seed", "value": 100 + rank, "ranks": [rank]} for rank in range(target.world)),
            {"do": "draw"},
            *updates(before, scheduled=True, first=seed),
            {"do": "set_decay", "model": "a", "weight_decay": 0.5},
            {"do": "set_betas", "model": "a", "betas": [0.8, 0.9]},
            averaging,
            {"do": "batches", "name": "l", "epoch": 1, "first": 3},
            {"do": "batches", "name": "m", "epoch": 2, "first": 1},
            {"do": "save", "model": ["a", "e"], "tag": "t"},
        ]
        rest: list[Operation] = [
            averaging,  # the second average after one update must change nothing
            PRINT,
            {"do": "draw"},
            *updates(after, scheduled=True, first=seed + 500),
            averaging,
            {"do": "rest_of_epoch", "name": "l"},
            {"do": "rest_of_epoch", "name": "m"},
            {"do": "batches", "name": "l", "epoch": 2},
            {"do": "batches", "name": "m", "epoch": 4},
            {"do": "weights", "model": "e"},
            LOOK,
            PRINT,
        ]
        again: list[Operation] = [AGAIN, *setup, {"do": "load", "model": ["a", "e"], "tag": "t"}]
        return self.program(target, *setup, *first, *rest, *again, *rest, **precision)

    def _pending(self, target: Target) -> Program:
        half: Operation = {"do": "backward", "model": "a", "batch": 3}
        weights: list[Operation] = [
            {"do": "build", "model": "e"},
            {"do": "prepare_inference", "model": "e"},
            {"do": "save", "model": "e", "tag": "e"},
        ]
        both: Operation = {"do": "save", "model": ["b", "a"], "tag": "v", "may_fail": True}
        return self.program(
            target, *trained(), *trained("b", seed=2), *updates(1, 2), half, saved(may_fail=True), {"do": "step", "model": "a"},
            saved("u", may_fail=True), both, *weights, accumulation_steps=2,
        )  # fmt: skip

    def _back(self, target: Target) -> Program:
        """Return to the state before training, and train again, in one process."""
        rest = [*updates(2, scheduled=True), LOOK, PRINT]
        return self.program(target, *trained(schedule=True), saved(), *rest, loaded(), *rest)

    def _last_skip(self, target: Target) -> Program:
        bad: list[Operation] = [
            {"do": "backward", "model": "a", "batch": 5, "poison": "nan"},
            {"do": "step", "model": "a", "may_fail": True},
        ]
        return self.program(
            target, *trained(), *updates(1), *bad, saved(), AGAIN, *trained(), loaded(), *bad, max_skipped_updates=2
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        live_buffers = st.builds(  # torch's batch norm cannot mix fp32 buffers and bf16 weights on the CPU
            lambda seed, before: self._resume(target, FP32, "tracked", seed, before), SEEDS, st.integers(0, 3)
        )
        return live_buffers | st.builds(
            lambda precision, kind, seed, before, after: self._resume(target, precision, kind, seed, before, after),
            st.sampled_from([FP32, BF16]), st.sampled_from(["regressor", "language", "frozen", "unused"]), SEEDS,
            st.integers(0, 3), st.integers(1, 3),
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        operations = execution.program.operations
        if execution.program.settings.get("max_skipped_updates") == 2:
            for error in self.errors(execution, len(operations) - 2):
                self.require_error(error, "StrategyError", "in a row", where="the second skip in a row, after loading")
            return
        if not any(operation.get("may_fail") for operation in operations) and AGAIN not in operations:
            self._check_halves(execution, next(index for index, _, _ in execution.each("load")))
            return
        starts = [index for index, operation in enumerate(operations) if operation == AGAIN]
        if not starts:
            failed = [index for index, operation in enumerate(operations) if operation.get("may_fail")]
            for index in failed:
                for error in self.errors(execution, index):
                    self.require_error(error, "StrategyError", "gradient", where="save_ckpt with a gradient pending")
            execution.at(0, len(operations) - 1)
            return
        self._check_halves(execution, starts[0])

    def _check_halves(self, execution: Execution, start: int) -> None:
        operations = execution.program.operations
        length = (
            len(operations)
            - 1
            - next(i for i, operation in enumerate(operations) if i >= start and operation["do"] == "load")
            - 1
        )
        first = start - length
        for rank in range(execution.target.world):
            for step in range(length):
                one, other = execution.at(rank, first + step), execution.at(rank, len(operations) - 1 - length + step)
                what = operations[first + step]["do"]
                self.require_same(one, other, f"rank {rank}: {what} after loading")


@CONTRACT.add
class Tags(OnDisk):
    """Saving and loading use the given tag, and saving under an existing tag replaces that checkpoint. Without a tag,
    save_ckpt numbers checkpoints by step, and load_ckpt loads the newest committed checkpoint that was saved with
    save_latest. An unknown tag raises CheckpointNotFoundError, which lists the available tags."""

    id = "CKPT-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, ["z", "a"]), self._program(target, ["a", "z", "a"]), self._hidden(target)]

    def _hidden(self, target: Target) -> Program:
        """Save one tag without save_latest, with it, and without it again."""
        turns: list[Operation] = []
        for number, latest in enumerate((False, True, False)):
            turns += [*updates(1, first=number), saved(save_latest=latest), LOOK]
            turns += [*updates(1, first=9), loaded(None, may_fail=not latest), LOOK]
        return self.program(target, *trained(), *turns, loaded("t"), LOOK)

    def _program(self, target: Target, tags: list[str]) -> Program:
        rounds = [
            operation for index, tag in enumerate(tags) for operation in (*updates(1, first=index), saved(tag), LOOK)
        ]
        last: list[Operation] = [*updates(2, first=50), saved(None), LOOK]
        hidden: list[Operation] = [*updates(1, first=60), saved("hidden", save_latest=False, max_num=9), LOOK]
        loads = [operation for tag in [*tags, "hidden"] for operation in (loaded(tag), LOOK)]
        missing = loaded("nowhere", may_fail=True)
        return self.program(
            target, *trained(), *rounds, *last, *hidden, *loads, loaded(None), LOOK, missing, loaded(None, store="empty", may_fail=True),
            {"do": "visible_names"}, max_norm=None,
        )  # fmt: skip

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        names = st.lists(
            st.sampled_from(["z", "a", "1", "best", "global_step9", "m n"]), min_size=1, max_size=2, unique=True
        )
        return st.builds(lambda tags: self._program(target, tags), names)

    @override
    def check(self, execution: Execution) -> None:
        if any("save_latest" in operation and operation["tag"] == "t" for _, operation, _ in execution.each("save")):
            self._check_hidden(execution)
            return
        paths = [seen for _, _, seen in execution.each("save")]
        tags = [operation["tag"] for _, operation, _ in execution.each("save")]
        looks = [seen[0] for _, _, seen in execution.each("weights")]
        saved_weights = dict(zip(tags, looks[: len(tags)], strict=True))
        loaded_tags = [operation["tag"] for _, operation, _ in execution.each("load") if not operation.get("may_fail")]
        for tag, weights in zip(loaded_tags, looks[len(tags) :], strict=True):
            self.require_same(saved_weights[tag], weights, f"tag {tag!r} loaded the weights of another tag")
        steps = len(tags) - 2 + 2
        for tag, seen in zip(tags, paths, strict=True):
            expected = f"s/{tag}" if tag is not None else f"s/global_step{steps}"
            self.require(
                all(observed["path"] == expected for observed in seen),
                f"expected the path {expected}, got {seen[0]['path']}",
            )
        failed = [index for index, operation in enumerate(execution.program.operations) if operation.get("may_fail")]
        for error in self.errors(execution, failed[0]):
            self.require_error(
                error,
                "CheckpointNotFoundError",
                "nowhere",
                *tags[:-2],
                "hidden",
                where="loading an unknown tag",
            )
        for error in self.errors(execution, failed[1]):
            self.require_error(error, "CheckpointNotFoundError", where="loading from an empty store")

    def _check_hidden(self, execution: Execution) -> None:
        for index, operation, _ in execution.each("load"):
            if operation.get("may_fail"):
                for error in self.errors(execution, index):
                    self.require_error(
                        error,
                        "CheckpointNotFoundError",
                        where="loading the newest of checkpoints saved without save_latest",
                    )
        looks = [seen[0] for _, _, seen in execution.each("weights")]
        self.require_same(looks[2], looks[3], "expected the checkpoint that was saved again, with save_latest")
        self.require_same(looks[4], looks[6], "expected the checkpoint that was saved last under the tag")


@CONTRACT.add
class ClientState(OnDisk):
    """client_state is restored unchanged. A value that cannot be stored safely raises before anything is written."""

    id = "CKPT-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        good = [
            operation for name in ("plain", "exact", "infinite", "marked", "none")
            for operation in (saved(name, client=name, max_num=9), loaded(name, client=name))
        ]  # fmt: skip
        bad = [
            saved(f"bad {name}", client=name, may_fail=True)
            for name in ("object", "function", "tensor", "set", "recursive", "deep key")
        ]
        return [self.program(target, *trained(), *good, *bad, {"do": "visible_names"})]

    @override
    def check(self, execution: Execution) -> None:
        for _, operation, seen in execution.each("load"):
            self.require(
                all(observed["client"] for observed in seen), f"the client_state {operation['client']!r} changed"
            )
        for index, operation, _ in execution.each("save"):
            if operation.get("may_fail"):
                for error in self.errors(execution, index):
                    self.require_error(
                        error, "TypeError", "client_state", where=f"a client_state with a {operation['client']}"
                    )
        names = execution.last("visible_names")[0]
        self.require(
            not [name for name in names if "bad" in name],
            f"expected nothing to be written of a client_state that cannot be stored, got {names}",
        )


@CONTRACT.add
class Rotation(OnDisk):
    """Rotation keeps at most max_num checkpoints and at most max_mem GB, including those saved without save_latest. It
    deletes the oldest first, and never the newest checkpoint, the newest one that was saved with save_latest, or a
    directory that is not a checkpoint of this store. Checkpoints whose tags are in ``keep`` are neither deleted nor
    counted. A max_num below 1 raises ConfigError."""

    id = "CKPT-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        hidden = [self._hidden(target, [True, False, False, True, False]), self._hidden(target, [False, False, False])]
        return [
            self._by_number(target, 2, 4), self._by_size(target), self._refused(target), self._kept(target), *hidden
        ]  # fmt: skip

    def _kept(self, target: Target) -> Program:
        more = [saved(f"t{index}", max_num=2, keep=["best"]) for index in range(3)]
        return self.program(target, *trained(), saved("best"), *more, {"do": "visible_names"})

    def _hidden(self, target: Target, latest: Sequence[bool]) -> Program:
        """Keep two checkpoints, some of them saved without save_latest."""
        saves = [
            operation
            for index, with_latest in enumerate(latest)
            for operation in (saved(f"t{index}", max_num=2, save_latest=with_latest), {"do": "visible_names"})
        ]
        return self.program(target, *trained(), *saves)

    def _by_number(self, target: Target, limit: int, count: int) -> Program:
        strangers: list[Operation] = [
            {"do": "foreign_directory", "store": "s", "name": "aaa"},
            {"do": "foreign_directory", "store": "s", "name": "global_step0"},
        ]
        saves = [
            operation
            for index in range(count)
            for operation in (saved(f"t{9 - index}", max_num=limit), {"do": "visible_names"})
        ]
        return self.program(target, *trained(), *strangers, *saves)

    def _by_size(self, target: Target) -> Program:
        saves = [
            operation for index in range(3) for operation in (saved(f"t{index}", max_mem=1e-9), {"do": "visible_names"})
        ]
        return self.program(target, *trained(), *saves, {"do": "rename", "store": "s", "old": "t2", "new": "best"},
                            saved("t3", max_mem=1e-9), {"do": "visible_names"})  # fmt: skip

    def _refused(self, target: Target) -> Program:
        return self.program(target, *trained(), saved(), saved("u", max_num=0, may_fail=True), {"do": "visible_names"})

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda limit, count: self._by_number(target, limit, count), st.integers(1, 3), st.integers(1, 5)
        )

    @override
    def check(self, execution: Execution) -> None:
        saves = [operation for _, operation, _ in execution.each("save")]
        if saves[-1].get("max_num") == 0:
            for error in self.errors(execution, list(execution.each("save"))[-1][0]):
                self.require_error(error, "ConfigError", "max_num", where="max_num=0")
            self.require(
                execution.last("visible_names")[0] == ["t"],
                f"after max_num=0, expected only t, got {execution.last('visible_names')[0]}",
            )
            return
        if "keep" in saves[-1]:
            for rank, names in enumerate(execution.last("visible_names")):
                self.require(
                    names == ["best", "t1", "t2"],
                    f"rank {rank}: with max_num=2, keep=['best'], expected best, t1 and t2, got {names}",
                )
            return
        if "save_latest" in saves[0]:
            self._check_hidden(execution, saves)
            return
        for number, (_, _, seen) in enumerate(execution.each("visible_names"), 1):
            done = [operation["tag"] for operation in saves[:number]]
            wanted = done[-saves[0]["max_num"] :] if "max_num" in saves[0] else done[-1:]
            strangers = ["aaa", "global_step0"] if "max_num" in saves[0] else ["best"] * (number > 3)
            for rank, names in enumerate(seen):
                self.require(
                    names == sorted([*wanted, *strangers]),
                    f"rank {rank}: after saving {done}, expected {sorted([*wanted, *strangers])}, got {names}",
                )

    def _check_hidden(self, execution: Execution, saves: Sequence[Operation]) -> None:
        kept: list[Operation] = []
        for operation, (_, _, seen) in zip(saves, execution.each("visible_names"), strict=True):
            kept.append(operation)
            if len(kept) > 2:  # the oldest, unless it is the only one that loads without a tag
                kept.pop(1 if not any(newer["save_latest"] for newer in kept[1:]) and kept[0]["save_latest"] else 0)
            names = [it["tag"] for it in kept]
            self.require(
                seen == [names] * len(seen), f"after saving {operation['tag']}, expected {names} to be kept, got {seen}"
            )


REPLACING = 0.5
"""The part of its changes on disk at which LightRFT's save has moved the replaced checkpoint, and not yet the new one."""
DAMAGES: list[tuple[str, float, int]] = [
    ("flip", 0.0, 0), ("flip", 0.01, 3), ("flip", 0.5, 7), ("flip", 0.999, 1), ("truncate", 0.5, 0),
    ("truncate", 0.999, 0), ("truncate", 0.0, 0), ("remove", 0.0, 0), ("flip in optimizer", 0.0, 2),
]  # fmt: skip


@CONTRACT.add
class Killed(OnDisk):
    """If any rank is killed at any time, also while it replaces a checkpoint under the same tag, the last committed
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
            loaded("three"), {"do": "hidden_names"}, DONE,
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
class Damage(OnDisk):
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
            attempts += [saved(store=f"s{number}"), *updates(1, first=number), damage, PRINT, attempt, PRINT]
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


SAMPLES = 60
REST: Operation = {"do": "rest_of_epoch", "name": "l"}


@CONTRACT.add
class AnyToAny(OnDisk):
    """There is one checkpoint format: any strategy at any world size loads what any other saved, and training continues
    within the parity tolerances, with the remaining samples of the epoch in the same order. (This clause runs FakeStrategy in one process, in both directions; the nox session
    `checkpoints` runs all combinations.)"""

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
        begun: Operation = {"do": "batches", "name": "l", "epoch": 1, "first": 2}
        return self.program(target, *self._setup(kind, seed), LOOK, share, begun, saved(), more, LOOK, REST, other)

    def _in(self, target: Target, kind: str = "regressor", seed: int = 3) -> Program:
        fake: Operation = {"do": "on_fake_strategy", "kind": kind, "seed": seed, "samples": SAMPLES, "batches": 3}
        begin, whole = {**fake, "count": 3, "save_to": "s"}, {**fake, "count": 6}
        more: Operation = {"do": "train_shared", "model": "a", "first": 3, "count": 3}
        return self.program(target, *self._setup(kind, seed + 1), LOOK, begin, loaded(), more, LOOK, REST, whole)

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
        mismatch = tolerances.relative(end, other, start, tolerances.ACROSS_FAMILIES)
        self.require(
            mismatch is None, f"FakeStrategy and this strategy continue differently from one checkpoint: {mismatch}"
        )
        self.require_alike(execution, "weights")
        rest = interleaved([{"batches": batches} for batches in execution.last("rest_of_epoch")])
        expected = execution.last("on_fake_strategy")[0]["rest"]
        self.require(
            bool(rest) and rest == expected[: len(rest)],
            f"expected the samples that FakeStrategy has left, {expected}, or as many as fill the batches of all ranks, got {rest}",
        )


@CONTRACT.add
class Choosing(OnDisk):
    """load_module_strict, load_optimizer_states, load_lr_scheduler_states and load_module_only each do exactly what
    their name says."""

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
        return self.program(target, *trained(), saved(), LOOK, *other, look, strict, look, lenient, look)

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


@CONTRACT.add
class Harmless(OnDisk):
    """Saving changes no parameter, gradient, optimizer state or random state. Every rank returns the same path."""

    id = "CKPT-9"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, asynchronous) for asynchronous in (False, True)]

    def _program(self, target: Target, asynchronous: bool) -> Program:
        around: list[Operation] = [
            {"do": "draw"}, *updates(2, scheduled=True), {"do": "state", "model": "a"}, saved(),
            {"do": "state", "model": "a"}, *updates(1, first=9, scheduled=True), LOOK,
        ]  # fmt: skip
        without: list[Operation] = [operation for operation in around if operation["do"] != "save"]
        return self.program(
            target, *trained(schedule=True), *around, AGAIN, *trained(schedule=True), *without, async_ckpt=asynchronous
        )

    @override
    def check(self, execution: Execution) -> None:
        saving = execution.last("save")
        for rank, observed in enumerate(saving):
            self.require(not observed["changed"], f"rank {rank}: saving changed {', '.join(observed['changed'])}")
            self.require(
                observed["path"] == saving[0]["path"],
                f"rank {rank}: expected the path of rank 0, {saving[0]['path']}, got {observed['path']}",
            )
        states = [seen for _, _, seen in execution.each("state")]
        self.require_same(states[0], states[1], "saving changed the model or its optimizer")
        one, other = (seen for _, _, seen in execution.each("weights"))
        self.require_same(other, one, "training continues differently than without saving")


@CONTRACT.add
class NoCode(OnDisk):
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
class Refused(OnDisk):
    """A full disk or a refused write on one rank raises on all ranks. Checkpoints that were committed earlier are still
    there, also the one that the refused save was to replace."""

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
            target, *trained(), *updates(1), saved(), loaded(), LOOK, *updates(1, first=4), refuse, failing, *waiting,
            {"do": "allow_writes"}, {"do": "visible_names"}, loaded(None), LOOK, async_ckpt=asynchronous,
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


@CONTRACT.add
class Asynchronous(OnDisk):
    """An asynchronous save stores the state at the time of the call, buffers included, whatever training does next. A
    second save, close() and a load wait for it."""

    id = "CKPT-12"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, ending) for ending in ("load", "save", "close")]

    def _program(self, target: Target, ending: str) -> Program:
        endings: dict[str, list[Operation]] = {
            "load": [],
            "save": [saved("u"), {"do": "visible_names"}],
            "close": [AGAIN, *trained(schedule=True, kind="tracked")],
        }
        setup = trained(schedule=True, kind="tracked")
        states: list[Operation] = [{"do": "state", "model": "a"}]
        return self.program(
            target, *setup, *updates(1, scheduled=True), *states, saved(), *updates(1, first=7, scheduled=True),
            *endings[ending], loaded(), *states, async_ckpt=True,
        )  # fmt: skip

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(lambda ending: self._program(target, ending), st.sampled_from(["load", "save", "close"]))

    @override
    def check(self, execution: Execution) -> None:
        before, after = (seen for _, _, seen in execution.each("state"))
        for rank, (one, other) in enumerate(zip(before, after, strict=True)):
            self.require_same(one, other, f"rank {rank}: expected the state at the time of the save")
        for _, _, seen in execution.each("visible_names"):
            self.require("t" in seen[0], f"a second save started before the first was committed: {seen[0]}")


@CONTRACT.add
class MicroBatches(OnDisk):
    """A run continues with another micro-batch size and the same train_batch_size: loading keeps the weights, the
    optimizer and the counters, and the loaders continue with the next sample in the same order."""

    id = "CKPT-13"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, 4, 2), self._program(target, 1, 4)]

    def _program(self, target: Target, before: int, after: int) -> Program:
        def setup(size: int) -> list[Operation]:
            loader = {"do": "loader", "name": "l", "samples": 16 * target.world, "batch_size": size}
            return [*trained(schedule=True), loader]

        state: Operation = {"do": "state", "model": "a"}
        rest: Operation = {"do": "rest_of_epoch", "name": "l"}
        restart: Operation = {"do": "restart", "settings": {"micro_train_batch_size": after}}
        first = [
            *updates(2, 4 // before, scheduled=True),
            {"do": "batches", "name": "l", "epoch": 1, "first": 4 // before},
        ]
        more = updates(1, 4 // after, first=50, scheduled=True)
        return self.program(
            target, *setup(before), *first, saved(), state, rest, restart, *setup(after), loaded(), state, rest, *more,
            micro_train_batch_size=before, train_batch_size=4 * target.world,
        )  # fmt: skip

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        sizes = st.sampled_from([1, 2, 4])
        return st.builds(lambda before, after: self._program(target, before, after), sizes, sizes)

    @override
    def check(self, execution: Execution) -> None:
        before, after = (seen for _, _, seen in execution.each("state"))
        wanted, samples = (seen for _, _, seen in execution.each("rest_of_epoch"))
        for rank in range(execution.target.world):
            self.require_same(before[rank], after[rank], f"rank {rank}: expected the state that was saved")
            self.require(
                [*chain(*samples[rank])] == [*chain(*wanted[rank])],
                f"rank {rank}: expected the loader to continue with {show(wanted[rank])}, got {show(samples[rank])}",
            )
        for _, _, seen in list(execution.each("step"))[-1:]:
            for rank, result in enumerate(seen):
                self.require(
                    bool(result["applied"]), f"rank {rank}: expected an update of the new number of micro-batches"
                )
