"""CKPT: checkpoints."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, same, show
from lightrft.conformance.contract import compare
from lightrft.conformance.contract.drawing import BF16, FP32, SEEDS, geometry, trained, updates

EMPTY: Operation = {"do": "empty_disk"}
DONE: Operation = {"do": "empty_disk", "keep": False}
AGAIN: Operation = {"do": "begin_again"}
PRINT: Operation = {"do": "fingerprint"}
LOOK: Operation = {"do": "weights", "model": "a"}


def saved(tag: str | None = "t", **more: Any) -> Operation:
    """save_ckpt of model a."""
    return {"do": "save", "model": "a", "tag": tag, **more}


def loaded(tag: str | None = "t", **more: Any) -> Operation:
    """load_ckpt of model a."""
    return {"do": "load", "model": "a", "tag": tag, **more}


class OnDisk(Clause):
    """A clause whose programs begin and end with nothing on disk."""

    settings: ClassVar[dict[str, Any]] = dict(FP32)

    def program(self, place: Place, *operations: Operation, window: int = 1, **settings: Any) -> Program:
        """A program of ``operations``."""
        merged = {**self.settings, **geometry(place, window), **settings}
        return Program(operations=(EMPTY, *operations, DONE), settings=merged)

    def errors(self, trial: Trial, index: int) -> list[Any]:
        """What each rank observed of an operation that must have failed everywhere."""
        seen = [trial.at(rank, index) for rank in range(trial.place.world)]
        for rank, it in enumerate(seen):
            self.require(is_error(it), f"operation {index}: rank {rank} raised nothing; got {show(it)}")
        return seen


@CONTRACT.add
class ExactResume(OnDisk):
    """Resume is exact: train a, save, train b equals load, train b, bit for bit, with model, optimizer, scheduler, step
    and skip counters, EMA, all random streams and the data position. A resumable checkpoint stands at an update
    boundary: with gradients pending, saving raises; weights alone may be saved at any time."""

    id = "CKPT-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        found = [self._resume(place), self._pending(place), self._last_skip(place), self._back(place)]
        return [*found, self._resume(place, BF16)] if place.world == 1 else found

    def _resume(
        self,
        place: Place,
        precision: Any = FP32,
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
            *({"do": "seed", "value": 100 + rank, "ranks": [rank]} for rank in range(place.world)),
            {"do": "draw"},
            *updates(before, scheduled=True, first=seed),
            averaging,
            {"do": "batches", "name": "l", "epoch": 1, "first": 3},
            {"do": "batches", "name": "m", "epoch": 2, "first": 1},
            {"do": "save", "model": ["a", "e"], "tag": "t"},
        ]
        rest: list[Operation] = [
            averaging,  # of an update that it has seen: it must not move
            PRINT,
            {"do": "draw"},
            *updates(after, scheduled=True, first=seed + 500),
            averaging,
            {"do": "go_on", "name": "l"},
            {"do": "go_on", "name": "m"},
            {"do": "weights", "model": "e"},
            LOOK,
            PRINT,
        ]
        again: list[Operation] = [AGAIN, *setup, {"do": "load", "model": ["a", "e"], "tag": "t"}]
        return self.program(place, *setup, *first, *rest, *again, *rest, **precision)

    def _pending(self, place: Place) -> Program:
        half: Operation = {"do": "backward", "model": "a", "batch": 3}
        weights: list[Operation] = [
            {"do": "build", "model": "e"},
            {"do": "prepare_inference", "model": "e"},
            {"do": "save", "model": "e", "tag": "e"},
        ]
        both: Operation = {"do": "save", "model": ["b", "a"], "tag": "v", "may_fail": True}
        return self.program(
            place, *trained(), *trained("b", seed=2), *updates(1, 2), half, saved(may_fail=True), {"do": "step", "model": "a"},
            saved("u", may_fail=True), both, *weights, window=2,
        )  # fmt: skip

    def _back(self, place: Place) -> Program:
        """Back to where nothing was trained yet, and on again, in one lifetime."""
        rest = [*updates(2, scheduled=True), LOOK, PRINT]
        return self.program(place, *trained(schedule=True), saved(), *rest, loaded(), *rest)

    def _last_skip(self, place: Place) -> Program:
        bad: list[Operation] = [
            {"do": "backward", "model": "a", "batch": 5, "poison": "nan"},
            {"do": "step", "model": "a", "may_fail": True},
        ]
        return self.program(
            place, *trained(), *updates(1), *bad, saved(), AGAIN, *trained(), loaded(), *bad, max_skipped_updates=2
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda precision, kind, seed, before, after: self._resume(place, precision, kind, seed, before, after),
            st.sampled_from([FP32, BF16]), st.sampled_from(["regressor", "language", "frozen", "unused"]), SEEDS,
            st.integers(0, 3), st.integers(1, 3),
        )  # fmt: skip

    @override
    def check(self, trial: Trial) -> None:
        operations = trial.program.operations
        if trial.program.settings.get("max_skipped_updates") == 2:
            for it in self.errors(trial, len(operations) - 2):
                self.require_error(it, "StrategyError", "in a row", where="the second skip in a row, after loading")
            return
        if not any(operation.get("may_fail") for operation in operations) and AGAIN not in operations:
            self._check_halves(trial, next(index for index, _, _ in trial.each("load")))
            return
        starts = [index for index, operation in enumerate(operations) if operation == AGAIN]
        if not starts:
            failed = [index for index, operation in enumerate(operations) if operation.get("may_fail")]
            for index in failed:
                for it in self.errors(trial, index):
                    self.require_error(it, "StrategyError", "gradient", where="save_ckpt with a gradient pending")
            trial.at(0, len(operations) - 1)
            return
        self._check_halves(trial, starts[0])

    def _check_halves(self, trial: Trial, start: int) -> None:
        operations = trial.program.operations
        length = (
            len(operations) - 1 - next(i for i, it in enumerate(operations) if i >= start and it["do"] == "load") - 1
        )
        first = start - length
        for rank in range(trial.place.world):
            for step in range(length):
                one, other = trial.at(rank, first + step), trial.at(rank, len(operations) - 1 - length + step)
                what = operations[first + step]["do"]
                self.require(
                    same(one, other), f"rank {rank}: after loading, {what} gave {show(other)}; without, {show(one)}"
                )


@CONTRACT.add
class Tags(OnDisk):
    """tag is honoured on save and load, and saving under one again replaces what was there; with none, save numbers by
    step and load takes the newest committed one that was saved with save_latest. A tag that is not there raises
    CheckpointNotFoundError, which lists those that are."""

    id = "CKPT-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, ["z", "a"]), self._program(place, ["a", "z", "a"])]

    def _program(self, place: Place, tags: list[str]) -> Program:
        rounds = [it for index, tag in enumerate(tags) for it in (*updates(1, first=index), saved(tag), LOOK)]
        last: list[Operation] = [*updates(2, first=50), saved(None), LOOK]
        hidden: list[Operation] = [*updates(1, first=60), saved("hidden", save_latest=False, max_num=9), LOOK]
        loads = [it for tag in [*tags, "hidden"] for it in (loaded(tag), LOOK)]
        missing = loaded("nowhere", may_fail=True)
        return self.program(
            place, *trained(), *rounds, *last, *hidden, *loads, loaded(None), LOOK, missing, loaded(None, store="empty", may_fail=True),
            {"do": "kept"}, max_norm=None,
        )  # fmt: skip

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        names = st.lists(
            st.sampled_from(["z", "a", "1", "best", "global_step9", "m n"]), min_size=1, max_size=2, unique=True
        )
        return st.builds(lambda tags: self._program(place, tags), names)

    @override
    def check(self, trial: Trial) -> None:
        paths = [seen for _, _, seen in trial.each("save")]
        tags = [operation["tag"] for _, operation, _ in trial.each("save")]
        looks = [seen[0] for _, _, seen in trial.each("weights")]
        there = dict(zip(tags, looks[: len(tags)], strict=True))
        asked = [operation["tag"] for _, operation, _ in trial.each("load") if not operation.get("may_fail")]
        for tag, found in zip(asked, looks[len(tags) :], strict=True):
            self.require(same(there[tag], found), f"tag {tag!r} gave the weights of another one")
        steps = len(tags) - 2 + 2
        for tag, seen in zip(tags, paths, strict=True):
            wanted = f"s/{tag}" if tag is not None else f"s/global_step{steps}"
            self.require(all(it["path"] == wanted for it in seen), f"saved as {seen[0]['path']}, wanted {wanted}")
        failed = [index for index, operation in enumerate(trial.program.operations) if operation.get("may_fail")]
        for it in self.errors(trial, failed[0]):
            self.require_error(
                it, "CheckpointNotFoundError", "nowhere", *tags[:-2], "hidden", where="loading a tag that is not there"
            )
        for it in self.errors(trial, failed[1]):
            self.require_error(it, "CheckpointNotFoundError", where="loading from an empty store")


@CONTRACT.add
class ClientState(OnDisk):
    """client_state comes back equal; a value that cannot be stored safely raises before anything is written."""

    id = "CKPT-3"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        good = [
            it for name in ("plain", "exact", "infinite", "marked", "none")
            for it in (saved(name, client=name, max_num=9), loaded(name, client=name))
        ]  # fmt: skip
        bad = [
            saved(f"bad {name}", client=name, may_fail=True)
            for name in ("object", "function", "tensor", "set", "recursive", "deep key")
        ]
        return [self.program(place, *trained(), *good, *bad, {"do": "kept"})]

    @override
    def check(self, trial: Trial) -> None:
        for _, operation, seen in trial.each("load"):
            self.require(all(it["client"] for it in seen), f"client state {operation['client']!r} came back changed")
        for index, operation, _ in trial.each("save"):
            if operation.get("may_fail"):
                for it in self.errors(trial, index):
                    self.require_error(
                        it, "TypeError", "client_state", where=f"a client state with a {operation['client']}"
                    )
        names = trial.last("kept")[0]
        self.require(
            not [it for it in names if "bad" in it], f"something was written of what cannot be stored: {names}"
        )


@CONTRACT.add
class Rotation(OnDisk):
    """Rotation keeps at most max_num checkpoints and at most max_mem GB, oldest first, never the newest, and never a
    directory that is not a checkpoint of this store. max_num below 1 is a ConfigError."""

    id = "CKPT-4"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._by_number(place, 2, 4), self._by_size(place), self._refused(place)]

    def _by_number(self, place: Place, limit: int, count: int) -> Program:
        strangers: list[Operation] = [
            {"do": "strange", "store": "s", "name": "aaa"},
            {"do": "strange", "store": "s", "name": "global_step0"},
        ]
        saves = [it for index in range(count) for it in (saved(f"t{9 - index}", max_num=limit), {"do": "kept"})]
        return self.program(place, *trained(), *strangers, *saves)

    def _by_size(self, place: Place) -> Program:
        saves = [it for index in range(3) for it in (saved(f"t{index}", max_mem=1e-9), {"do": "kept"})]
        return self.program(place, *trained(), *saves, {"do": "rename", "store": "s", "old": "t2", "new": "best"},
                            saved("t3", max_mem=1e-9), {"do": "kept"})  # fmt: skip

    def _refused(self, place: Place) -> Program:
        return self.program(place, *trained(), saved(), saved("u", max_num=0, may_fail=True), {"do": "kept"})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda limit, count: self._by_number(place, limit, count), st.integers(1, 3), st.integers(1, 5)
        )

    @override
    def check(self, trial: Trial) -> None:
        saves = [operation for _, operation, _ in trial.each("save")]
        if saves[-1].get("max_num") == 0:
            for it in self.errors(trial, list(trial.each("save"))[-1][0]):
                self.require_error(it, "ConfigError", "max_num", where="max_num=0")
            self.require(trial.last("kept")[0] == ["t"], f"after max_num=0 there are {trial.last('kept')[0]}")
            return
        for number, (_, _, seen) in enumerate(trial.each("kept"), 1):
            done = [it["tag"] for it in saves[:number]]
            wanted = done[-saves[0]["max_num"] :] if "max_num" in saves[0] else done[-1:]
            strangers = ["aaa", "global_step0"] if "max_num" in saves[0] else ["best"] * (number > 3)
            for rank, names in enumerate(seen):
                self.require(
                    names == sorted([*wanted, *strangers]),
                    f"rank {rank}: after saving {done} there are {names}, wanted {sorted([*wanted, *strangers])}",
                )


DAMAGES: list[tuple[str, float, int]] = [
    ("flip", 0.0, 0), ("flip", 0.01, 3), ("flip", 0.5, 7), ("flip", 0.999, 1), ("truncate", 0.5, 0),
    ("truncate", 0.999, 0), ("truncate", 0.0, 0), ("remove", 0.0, 0), ("flip in optimizer", 0.0, 2),
]  # fmt: skip


@CONTRACT.add
class Killed(OnDisk):
    """Killed at any instant (any rank), the store still loads its last committed checkpoint; what was half-written is
    never picked and is cleaned up by the next save."""

    id = "CKPT-5"
    ends_workers = True

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            self._program(place, 0.4, [place.world - 1]),
            self._program(place, 0.8, [0]),
            self._program(place, 1.0, [0], asynchronous=place.world > 1),
        ]

    def _program(self, place: Place, part: float, ranks: list[int], asynchronous: bool = False) -> Program:
        """Save, train, and be killed while saving and rotating. What is loaded was waited for."""
        program = self.program(
            place, *trained(), saved("zero"), loaded("zero"), *updates(1), {"do": "note_weights", "model": "a", "name": "one"},
            {"do": "count_changes"}, saved("one", max_num=1), loaded("one"), *updates(1, first=5),
            {"do": "note_weights", "model": "a", "name": "two"}, {"do": "kill_within", "part": part, "ranks": ranks},
            saved("two", max_num=1, may_fail=True), {"do": "close", "may_fail": True},
            {"do": "end", "ranks": list(range(place.world))}, async_ckpt=asynchronous,
        )  # fmt: skip
        after = (
            *trained(seed=9), {"do": "kept"}, loaded(None), {"do": "noted_weights", "model": "a"}, saved("three"),
            loaded("three"), {"do": "hidden"}, DONE,
        )  # fmt: skip
        return replace(program, operations=program.operations[:-1], afterwards=replace(program, operations=after))

    @override
    def check(self, trial: Trial) -> None:
        after = trial.afterwards
        assert after is not None
        after.at(0, len(after.program.operations) - 1)
        names, path = after.last("kept")[0], after.last_of("load", 0)[0]["path"]
        newest = "two" if "two" in names else "one"
        self.require(path == f"s/{newest}", f"of {names}, {path} was loaded; wanted s/{newest}")
        for rank, noted in enumerate(after.last("noted_weights")):
            self.require(noted == [newest], f"rank {rank}: the weights are those noted as {noted}; wanted {newest}")
        left = after.last("hidden")[0]
        self.require(not left, f"after the next save there is still {', '.join(left)}")


@CONTRACT.add
class Damage(OnDisk):
    """A flipped bit, a truncated or a missing file is found at load and raises CheckpointError naming the file, before
    any state has changed."""

    id = "CKPT-6"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, [(*it, file) for it in DAMAGES]) for file in range(place.world + 1)]

    def _program(self, place: Place, damages: Sequence[tuple[str, float, int, int]]) -> Program:
        trials: list[Operation] = []
        for number, (what, at, bit, file) in enumerate(damages):
            spoil: Operation = {"do": "damage", "what": what, "at": at, "bit": bit, "file": file, "store": f"s{number}"}
            attempt = loaded("t", store=f"s{number}", may_fail=True)
            trials += [saved(store=f"s{number}"), *updates(1, first=number), spoil, PRINT, attempt, PRINT]
        return self.program(place, *trained(), *updates(1), *trials)

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        one = st.tuples(
            st.sampled_from(["flip", "flip", "truncate", "remove"]), st.floats(0, 1, exclude_max=True), st.integers(0, 7),
            st.integers(0, place.world),
        )  # fmt: skip
        return st.builds(lambda damages: self._program(place, damages), st.lists(one, min_size=1, max_size=4))

    @override
    def check(self, trial: Trial) -> None:
        prints = [seen for _, _, seen in trial.each("fingerprint")]
        spoiled = [(operation, seen[0]) for _, operation, seen in trial.each("damage")]
        for number, (index, _, _) in enumerate(trial.each("load")):
            damage, name = spoiled[number]
            where = f"loading after {damage['what']} at {damage['at']} of {name}"
            for it in self.errors(trial, index):
                self.require_error(it, "CheckpointError", name, where=where)
            self.require(prints[2 * number] == prints[2 * number + 1], f"{where}: state had changed")


@CONTRACT.add
class AnyToAny(OnDisk):
    """One format: saved by any strategy at any world size, loaded by any strategy at any world size, and training
    continues within the parity table. (Here: by FakeStrategy on one process, both ways; the session `checkpoints` has
    the whole table.)"""

    id = "CKPT-7"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._out(place), self._in(place)]

    def _setup(self, kind: str, seed: int) -> list[Operation]:
        return trained(kind=kind, seed=seed)

    def _out(self, place: Place, kind: str = "regressor", seed: int = 3) -> Program:
        share: Operation = {"do": "train_shared", "model": "a", "first": 0, "count": 3}
        more: Operation = {"do": "train_shared", "model": "a", "first": 3, "count": 3}
        other: Operation = {"do": "elsewhere", "kind": kind, "seed": seed + 1, "first": 3, "count": 3, "load_from": "s"}
        return self.program(place, *self._setup(kind, seed), LOOK, share, saved(), more, LOOK, other)

    def _in(self, place: Place, kind: str = "regressor", seed: int = 3) -> Program:
        begin: Operation = {"do": "elsewhere", "kind": kind, "seed": seed, "count": 3, "save_to": "s"}
        whole: Operation = {"do": "elsewhere", "kind": kind, "seed": seed, "count": 6}
        more: Operation = {"do": "train_shared", "model": "a", "first": 3, "count": 3}
        return self.program(place, *self._setup(kind, seed + 1), LOOK, begin, loaded(), more, LOOK, whole)

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        kinds = st.sampled_from(["regressor", "language", "frozen", "unused"])
        return st.one_of(
            st.builds(lambda kind, seed: self._out(place, kind, seed), kinds, SEEDS),
            st.builds(lambda kind, seed: self._in(place, kind, seed), kinds, SEEDS),
        )

    @override
    def check(self, trial: Trial) -> None:
        start, end = (seen[0] for _, _, seen in trial.each("weights"))
        other = trial.last("elsewhere")[0]["weights"]
        wrong = compare.relative(end, other, start, compare.ACROSS_FAMILIES)
        self.require(wrong is None, f"FakeStrategy and this strategy, one from the other's checkpoint: {wrong}")
        self.require_alike(trial, "weights")


@CONTRACT.add
class Choosing(OnDisk):
    """load_module_strict, load_optimizer_states, load_lr_scheduler_states and load_module_only each do what they say and
    nothing else."""

    id = "CKPT-8"

    OPTIONS: ClassVar[list[dict[str, Any]]] = [
        {"load_optimizer_states": False},
        {"load_lr_scheduler_states": False},
        {"load_module_only": True},
        {},
    ]

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._options(place), self._strict(place)]

    def _options(self, place: Place) -> Program:
        states: list[Operation] = [{"do": "state", "model": "a"}, {"do": "random_state"}]
        trials: list[Operation] = []
        for number, option in enumerate(self.OPTIONS):
            trials += [
                *updates(1, first=number + 10, scheduled=True),
                {"do": "draw"},
                *states,
                loaded(**option),
                *states,
                saved(None, store="numbers"),
            ]
        setup = [*trained(schedule=True), *updates(2, scheduled=True), *states, saved()]
        return self.program(place, *setup, *trials)

    def _strict(self, place: Place) -> Program:
        other = trained("b", "unused", seed=4)
        more = {"load_module_only": True, "may_fail": True}
        strict: Operation = {"do": "load", "model": "b", "tag": "t", **more}
        lax: Operation = {"do": "load", "model": "b", "tag": "t", "load_module_only": True, "load_module_strict": False}
        look: Operation = {"do": "weights", "model": "b"}
        return self.program(place, *trained(), saved(), LOOK, *other, look, strict, look, lax, look)

    @override
    def check(self, trial: Trial) -> None:
        if list(trial.each("random_state")):
            self._check_options(trial)
        else:
            self._check_strict(trial)

    def _check_options(self, trial: Trial) -> None:
        for rank in range(trial.place.world):
            states = [seen[rank] for _, _, seen in trial.each("state")]
            streams = [seen[rank] for _, _, seen in trial.each("random_state")]
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
                    self.require(
                        after[what] == wanted,
                        f"rank {rank}: {option or 'by default'}: {what} is not as it was {'before loading' if stays else 'saved'}",
                    )
                wanted = random[0] if module_only else streams[0]
                self.require(random[1] == wanted, f"rank {rank}: {option or 'by default'}: the random streams")
                path, updates_made = trial.last_of("save", 1 + number)[rank]["path"], 3 if module_only else 2
                self.require(
                    path == f"numbers/global_step{updates_made}",
                    f"rank {rank}: {option or 'by default'}: the next checkpoint is {path}, after {updates_made} updates",
                )

    def _check_strict(self, trial: Trial) -> None:
        index = next(i for i, operation in enumerate(trial.program.operations) if operation.get("may_fail"))
        for it in self.errors(trial, index):
            self.require_error(it, "CheckpointError", "spare", where="loading a model with more parameters")
        source, *looks = (seen[0] for _, _, seen in trial.each("weights"))
        self.require(same(looks[0], looks[1]), "a load that raised had changed weights")
        for name, tensor in looks[2].items():
            wanted = source.get(name, looks[0][name])
            self.require(same(tensor, wanted), f"load_module_strict=False: {name} is not as it should be")


@CONTRACT.add
class Harmless(OnDisk):
    """Saving changes no parameter, gradient, state or random stream; every rank returns the same path."""

    id = "CKPT-9"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, asynchronous) for asynchronous in (False, True)]

    def _program(self, place: Place, asynchronous: bool) -> Program:
        around: list[Operation] = [
            {"do": "draw"}, *updates(2, scheduled=True), {"do": "state", "model": "a"}, saved(),
            {"do": "state", "model": "a"}, *updates(1, first=9, scheduled=True), LOOK,
        ]  # fmt: skip
        without: list[Operation] = [it for it in around if it["do"] != "save"]
        return self.program(
            place, *trained(schedule=True), *around, AGAIN, *trained(schedule=True), *without, async_ckpt=asynchronous
        )

    @override
    def check(self, trial: Trial) -> None:
        saving = trial.last("save")
        for rank, it in enumerate(saving):
            self.require(it["unchanged"], f"rank {rank}: saving changed a weight, a gradient, state or a random stream")
            self.require(
                it["path"] == saving[0]["path"], f"rank {rank} returned {it['path']}, rank 0 {saving[0]['path']}"
            )
        states = [seen for _, _, seen in trial.each("state")]
        self.require(same(states[0], states[1]), "saving changed the model or its optimizer")
        one, other = (seen for _, _, seen in trial.each("weights"))
        self.require(same(one, other), "training went on otherwise than without saving")


@CONTRACT.add
class NoCode(OnDisk):
    """Loading runs no code from the checkpoint."""

    id = "CKPT-10"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            self.program(
                place, *trained(), saved(), {"do": "trap", "replace": replace}, loaded(may_fail=True), {"do": "sprung"}
            )
            for replace in (True, False)
        ]

    @override
    def check(self, trial: Trial) -> None:
        self.require(not any(trial.last("sprung")), "loading ran a pickle that was put into the checkpoint")
        if trial.program.operations[-4]["replace"]:
            self.errors(trial, len(trial.program.operations) - 3)


@CONTRACT.add
class Refused(OnDisk):
    """A full disk or a refused write on one rank raises on all ranks, and what was committed before is still there."""

    id = "CKPT-11"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, rank, False) for rank in range(place.world)] + [self._program(place, 0, True)]

    def _program(self, place: Place, rank: int, asynchronous: bool) -> Program:
        refuse: Operation = {"do": "refuse", "ranks": [rank]}
        failing = saved("u", may_fail=not asynchronous)
        waiting = [saved("v", may_fail=True)] if asynchronous else []
        return self.program(
            place, *trained(), *updates(1), saved(), loaded(), LOOK, *updates(1, first=4), refuse, failing, *waiting,
            {"do": "allow"}, {"do": "kept"}, loaded(None), LOOK, async_ckpt=asynchronous,
        )  # fmt: skip

    @override
    def check(self, trial: Trial) -> None:
        operations = trial.program.operations
        last = max(index for index, operation in enumerate(operations) if operation.get("may_fail"))
        for it in self.errors(trial, last):
            self.require_error(it, "CheckpointError", "safetensors", where="saving where the system refuses to write")
        self.require(trial.last("kept")[0] == ["t"], f"after a refused save there are {trial.last('kept')[0]}")
        one, other = (seen for _, _, seen in trial.each("weights"))
        self.require(same(one, other), "what was committed before is not what is loaded")


@CONTRACT.add
class Asynchronous(OnDisk):
    """An asynchronous save stores the state as of the call, whatever training does next; a second save, close() or a load
    waits for it."""

    id = "CKPT-12"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, ending) for ending in ("load", "save", "close")]

    def _program(self, place: Place, ending: str) -> Program:
        endings: dict[str, list[Operation]] = {
            "load": [],
            "save": [saved("u"), {"do": "kept"}],
            "close": [AGAIN, *trained(schedule=True)],
        }
        setup = trained(schedule=True)
        states: list[Operation] = [{"do": "state", "model": "a"}]
        return self.program(
            place, *setup, *updates(1, scheduled=True), *states, saved(), *updates(1, first=7, scheduled=True),
            *endings[ending], loaded(), *states, async_ckpt=True,
        )  # fmt: skip

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(lambda ending: self._program(place, ending), st.sampled_from(["load", "save", "close"]))

    @override
    def check(self, trial: Trial) -> None:
        before, after = (seen for _, _, seen in trial.each("state"))
        for rank, (one, other) in enumerate(zip(before, after, strict=True)):
            self.require(same(one, other), f"rank {rank}: what was loaded is not the state as of the save")
        for _, _, seen in trial.each("kept"):
            self.require("t" in seen[0], f"a second save began before the first was there: {seen[0]}")
