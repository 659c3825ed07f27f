"""The directory of checkpoints: tags, and rotation."""

from collections.abc import Sequence

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
    OnDisk,
    loaded,
    saved,
)
from lightrft.conformance.contract.program_parts import trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS


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
            turns += [*updates(1, first=number), saved(save_latest=latest), READ_WEIGHTS]
            turns += [*updates(1, first=9), loaded(None, may_fail=not latest), READ_WEIGHTS]
        return self.program(target, *trained(), *turns, loaded("t"), READ_WEIGHTS)

    def _program(self, target: Target, tags: list[str]) -> Program:
        rounds = [
            operation
            for index, tag in enumerate(tags)
            for operation in (*updates(1, first=index), saved(tag), READ_WEIGHTS)
        ]
        last: list[Operation] = [*updates(2, first=50), saved(None), READ_WEIGHTS]
        hidden: list[Operation] = [*updates(1, first=60), saved("hidden", save_latest=False, max_num=9), READ_WEIGHTS]
        loads = [operation for tag in [*tags, "hidden"] for operation in (loaded(tag), READ_WEIGHTS)]
        missing = loaded("nowhere", may_fail=True)
        return self.program(
            target, *trained(), *rounds, *last, *hidden, *loads, loaded(None), READ_WEIGHTS, missing, loaded(None, store="empty", may_fail=True),
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
class Rotation(OnDisk):
    """Rotation keeps at most max_num checkpoints, and at most max_mem GB, of this run and the runs that it continues,
    including those saved without save_latest. It deletes the oldest first. It never deletes the newest checkpoint or
    the newest one that was saved with save_latest, even if they exceed a limit, or a directory that is not a checkpoint
    of this store. Checkpoints of other runs, and those whose tags are in ``keep``, are neither deleted nor counted. A
    max_num below 1 raises ConfigError."""

    id = "CKPT-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        hidden = [self._hidden(target, [True, False, False, True, False]), self._hidden(target, [False, False, False])]
        return [
            self._by_number(target, 2, 4), self._by_size(target), self._by_measure(target), self._refused(target),
            self._kept(target), *hidden,
        ]  # fmt: skip

    def _by_measure(self, target: Target) -> Program:
        """Rotate with room for a little more than two checkpoints, and then for a little less."""
        saves = [
            operation
            for tag, room in (("t0", None), ("t1", None), ("t2", 2.1), ("t3", 1.95))
            for operation in (saved(tag, max_num=9, room=room), {"do": "visible_names"})
        ]
        return self.program(target, *trained(), *saves)

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
        others: list[Operation] = [
            {"do": "foreign_directory", "store": "s", "name": "aaa"},
            {"do": "foreign_directory", "store": "s", "name": "global_step0"},
        ]
        saves = [
            operation
            for index in range(count)
            for operation in (saved(f"t{9 - index}", max_num=limit), {"do": "visible_names"})
        ]
        return self.program(target, *trained(), *others, *saves)

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
        if "room" in saves[-1]:
            expected = [["t0"], ["t0", "t1"], ["t1", "t2"], ["t3"]]
            for tags, (_, _, seen) in zip(expected, list(execution.each("visible_names")), strict=True):
                self.require(
                    seen == [tags] * len(seen), f"with room for two checkpoints and one, expected {tags}, got {seen}"
                )
            return
        for number, (_, _, seen) in enumerate(execution.each("visible_names"), 1):
            done = [operation["tag"] for operation in saves[:number]]
            wanted = done[-saves[0]["max_num"] :] if "max_num" in saves[0] else done[-1:]
            others = ["aaa", "global_step0"] if "max_num" in saves[0] else ["best"] * (number > 3)
            for rank, names in enumerate(seen):
                self.require(
                    names == sorted([*wanted, *others]),
                    f"rank {rank}: after saving {done}, expected {sorted([*wanted, *others])}, got {names}",
                )

    def _check_hidden(self, execution: Execution, saves: Sequence[Operation]) -> None:
        kept: list[Operation] = []
        for operation, (_, _, seen) in zip(saves, execution.each("visible_names"), strict=True):
            kept.append(operation)
            if len(kept) > 2:  # the oldest, unless it is the only one that loads without a tag
                kept.pop(1 if not any(newer["save_latest"] for newer in kept[1:]) and kept[0]["save_latest"] else 0)
            names = [save["tag"] for save in kept]
            self.require(
                seen == [names] * len(seen), f"after saving {operation['tag']}, expected {names} to be kept, got {seen}"
            )
