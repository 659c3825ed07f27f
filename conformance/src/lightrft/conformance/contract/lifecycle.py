"""LIFE and LOG: lifecycle, process group, logging."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import (
    CONTRACT,
    Clause,
    Execution,
    Operation,
    Program,
    Record,
    Target,
    difference,
    is_error,
    same,
    show,
)
from lightrft.conformance.contract.program_parts import geometry, micro_batch, program, trained, updates

SUM: Operation = {"do": "all_reduce", "data": {"per_rank": [1.0, 1.0]}, "op": "sum"}


@CONTRACT.add
class Ready(Clause):
    """A strategy from get_strategy is ready to use. setup_distributed may be called again any number of times and
    changes nothing."""

    id = "LIFE-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        again = {"do": "setup_again"}
        operations = (
            SUM,
            again,
            SUM,
            {"do": "draw"},
            {"do": "random_state"},
            {"do": "resources", "remember": "once"},
            again,
            again,
            {"do": "resources", "compare": "once"},
            {"do": "random_state"},
            SUM,
        )
        return [Program(operations=operations)]

    @override
    def check(self, execution: Execution) -> None:
        total = float(sum(1 + rank for rank in range(execution.target.world)))
        for index, _, seen in execution.each("all_reduce"):
            self.require(
                all(observed["result"] == total for observed in seen),
                f"all_reduce (operation {index}): expected {total}, got {show(seen)}",
            )
        for rank, grown in enumerate(execution.last("resources")):
            self.require(
                not (grown["threads"] > 0 or grown["files"] > 0 or grown["environment"]),
                f"rank {rank}: setup_distributed added {show(grown)}",
            )
        before, after = [seen for _, _, seen in execution.each("random_state")]
        self.require(before == after, "setup_distributed advanced a random number generator")


@CONTRACT.add
class WorldInfo(Clause):
    """world_size, get_rank() and is_rank_0() agree with the process group. Without one they are 1, 0 and True, and the
    strategy sets no environment variable and creates no process group. A distributed strategy started without torchrun
    runs as a world of size 1."""

    id = "LIFE-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        plain = Program(operations=({"do": "world"},), settings=geometry(target, 3))
        if not target.grouped or target.device != "cpu":
            return [plain]
        # each rank alone on its host, and then an environment that contradicts the process group
        first, changed = ({"do": "environ", name: "0"} for name in ("LOCAL_RANK", "RANK"))
        return [plain, replace(plain, operations=(first, {"do": "world"}, changed, {"do": "world"}))]

    @override
    def check(self, execution: Execution) -> None:
        for _, _, places in execution.each("world"):
            self._check(execution, places)

    def _check(self, execution: Execution, places: list[Record]) -> None:
        for rank, seen in enumerate(places):
            expected = (execution.target.world, rank, rank == 0)
            reported = (seen["world_size"], seen["rank"], seen["is_rank_0"])
            self.require(
                reported == expected,
                f"rank {rank}: expected (world_size, rank, is_rank_0) = {expected}, got {reported}",
            )
            self.require(
                seen["accumulation_steps"] == 3,
                f"rank {rank}: expected accumulated_gradient=3, got {seen['accumulation_steps']}",
            )
            if execution.target.grouped:
                self.require(
                    seen["group"] == [execution.target.world, rank],
                    f"rank {rank}: expected the process group {[execution.target.world, rank]}, got {seen['group']}",
                )
            else:
                self.require(
                    seen["group"] is None and not seen["environment"],
                    f"expected no process group and no variables, got {seen['group']} and {seen['environment']}",
                )


TRAIN, SYNC = micro_batch(5), {"do": "sync", "model": "a"}
TIMEOUT, CONFIGURED = 2.0, 5.0
"""Timeouts in seconds: given to `setup_distributed`, and in the settings."""
NAMES = {
    "all_reduce": ("all_reduce",),
    "sync": ("update_engine_weights", "full_parameters"),
    "backward": ("forward", "backward"),
    "step": ("optimizer_step", "backward"),
}
"""The message must contain one of these names, by the operation called."""


@CONTRACT.add
class LostPeers(Clause):
    """If a rank dies or does not reach a collective, called directly or inside forward, backward, step or sync, in the
    first update or a later one, the others raise within the configured timeout. The message names the operation that was
    waiting. Nothing waits forever."""

    id = "LIFE-3"
    smallest_world = 2
    ends_workers = True

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        last = [target.world - 1]
        absent: Operation = {"do": "idle", "until": list(range(target.world - 1)), "ranks": last}
        short = {**absent, "seconds": 8 * TIMEOUT}
        configured = {**absent, "seconds": 4 * CONFIGURED}
        # building and preparing is slow on a shared core, so set the short timeout afterwards
        soon: Operation = {"do": "setup_again", "timeout": TIMEOUT}
        before = [*trained(kind="language"), *updates(1), {"do": "engine", "actor": "a"}, SUM, soon, SUM]
        return [
            self._program(target, [SUM], configured, [SUM], timeout=CONFIGURED),
            self._program(target, before, short, TRAIN),
            self._program(target, before, short, [SYNC]),
            self._program(target, before, {"do": "exit_process", "ranks": last}, [SUM, *TRAIN, SYNC]),
            self._later(target, short),
        ]

    def _later(self, target: Target, absent: Operation) -> Program:
        """Lose the last rank in the middle of the fifth update."""
        soon: Operation = {"do": "setup_again", "timeout": TIMEOUT}
        before = [*trained(), *updates(4, 2), *micro_batch(8), soon, SUM]
        return self._program(target, before, absent, TRAIN, seconds=40, **geometry(target, 2))

    def _program(
        self, target: Target, before: list[Operation], absent: Operation, calls: list[Operation], **settings: Any
    ) -> Program:
        """The last rank runs ``absent`` while the others run ``calls``."""
        others = list(range(target.world - 1))
        waiting = [{**operation, "ranks": others, "may_fail": True} for operation in calls]
        return program(target, *before, absent, *waiting, {"do": "report_done", "ranks": others}, **settings)

    @override
    def check(self, execution: Execution) -> None:
        """Check the errors of the ranks that returned, and that it was in time; the driver notices those that did not."""
        for index, operation in enumerate(execution.program.operations):
            if operation["do"] == "idle":
                self.require(
                    execution.at(execution.target.world - 1, index) is True,
                    f"the other ranks still waited for rank {execution.target.world - 1} after {operation['seconds']:g} s",
                )
        for rank in range(execution.target.world - 1):
            waited = [
                (index, operation)
                for index, operation in enumerate(execution.program.operations)
                if operation.get("may_fail")
            ]
            for index, operation in waited:
                called, seen = operation["do"], execution.at(rank, index)
                if called == "backward" and not is_error(seen):
                    continue  # a strategy need not communicate before the step
                if called == "step" and is_error(execution.at(rank, index - 1)):
                    continue  # backward has said so; what remains of the step may need other ranks only
                where = f"rank {rank}, {called} without the others"
                self.require_error(seen, "StrategyError", where=where)
                self.require(
                    any(name in seen["message"] for name in NAMES[called]),
                    f"rank {rank}: expected one of {', '.join(NAMES[called])} in the message, got {seen['message']!r}",
                )


@CONTRACT.add
class Seeds(Clause):
    """set_seed makes the random numbers of Python, NumPy and torch reproducible."""

    id = "LIFE-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(0), self._program(2**32 - 1)]

    def _program(self, seed: int) -> Program:
        again: list[Operation] = [{"do": "seed", "value": seed}, {"do": "draw"}]
        return Program(
            operations=(*again, {"do": "draw"}, *again, {"do": "seed", "value": (seed + 1) % 2**32}, {"do": "draw"})
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.integers(0, 2**32 - 1).map(self._program)

    @override
    def check(self, execution: Execution) -> None:
        draws = [seen for _, _, seen in execution.each("draw")]
        for rank in range(execution.target.world):
            first, second, again, other = [draw[rank] for draw in draws]
            self.require(same(first, again), f"rank {rank}: the same seed: {difference(first, again)}")
            for stream, (left, right, third) in enumerate(zip(first, second, other, strict=True)):
                name = ("Python's", "NumPy's", "torch's")[stream]
                self.require(
                    not same(left, right) and not same(left, third),
                    f"rank {rank}: {name} random numbers do not change, or do not depend on the seed",
                )


@CONTRACT.add
class Lifetimes(Clause):
    """close(), and leaving a with block even by an exception, is idempotent and releases what the strategy created:
    process groups and their threads, child processes and environment variables, also after it saved and loaded. A second
    strategy in the same process works, and leaves no more threads, files or variables than the first."""

    id = "LIFE-5"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        files: list[Operation] = [{"do": "save", "model": "a", "tag": "t"}, {"do": "load", "model": "a", "tag": "t"}]
        engine: Operation = {"do": "engine", "kind": target.engine, "actor": "a"}
        once = [*trained(kind=target.language_model), *updates(1), *files, engine, files[0], SUM]
        again: list[Operation] = []
        for remember in ("first", "second", "third"):
            again += [
                *once,
                {"do": "close"},
                {"do": "close"},
                {"do": "resources", "remember": remember, "compare": "nothing"},
                {"do": "restart"},
            ]
        looks: list[Operation] = [*once, {"do": "close"}, {"do": "resources", "compare": "second"}]
        begin: list[Operation] = [{"do": "empty_disk"}, {"do": "resources", "remember": "nothing"}]
        end: Operation = {"do": "empty_disk", "keep": False}
        left: Operation = {"do": "resources", "compare": "nothing"}
        return [
            *(
                program(target, *begin, *again, *looks, end, seconds=240, async_ckpt=asynchronous)
                for asynchronous in (False, True)
            ),
            Program(operations=(*begin, SUM, {"do": "leave_context"}, left)),
            program(target, *begin, *once, {"do": "leave_context", "raising": True}, end),
        ]

    @override
    def check(self, execution: Execution) -> None:
        for _, operation, seen in execution.each("resources"):
            if "compare" not in operation:
                continue
            for rank, grown in enumerate(seen):
                self.require(not grown["initialized"], f"rank {rank}: close left a process group")
                self.require(not grown["environment"], f"rank {rank}: close left the variables {grown['environment']}")
                self.require(grown["children"] <= 0, f"rank {rank}: close left {grown['children']} child processes")
                if (
                    "remember" not in operation and operation["compare"] == "nothing"
                ):  # no model is kept, which may hold a group
                    self.require(
                        grown["group threads"] <= 0,
                        f"rank {rank}: close left {grown['group threads']} threads of process groups",
                    )
                if operation["compare"] == "second":
                    self.require(
                        grown["threads"] <= 0, f"rank {rank}: each strategy leaves {grown['threads']} more threads"
                    )
                    self.require(
                        grown["files"] <= 0, f"rank {rank}: each strategy leaves {grown['files']} more open files"
                    )
        for _, _, seen in execution.each("leave_context"):
            self.require(all(seen), "leaving the with block left a process group or an engine")


@CONTRACT.add
class CleanModels(Clause):
    """A strategy attaches no more to the caller's models with each update. close() removes its hooks and methods from every
    model whose parameters it leaves whole."""

    id = "LIFE-11"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        look: list[Operation] = [{"do": "attachments", "model": model} for model in "ab"]
        uses: list[Operation] = [
            {"do": "weights", "model": "a"},
            {"do": "forward", "model": "b", "batch": 3},
            {"do": "offload_model", "model": "b"},
            {"do": "reload_model", "model": "b"},
        ]
        setup: list[Operation] = [
            {"do": "build", "model": "b", "seed": 2},
            {"do": "prepare_inference", "model": "b"},
        ]
        build, *rest = trained(kind="tracked")
        return [
            program(
                target, setup[0], build, *look, *setup[1:], *rest, *updates(1), *uses, *look, *updates(3), *uses, *uses,
                *look, {"do": "close"}, *look,
            )
        ]  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        looks = [seen for _, _, seen in execution.each("attachments")]
        for rank in range(execution.target.world):
            for model in (0, 1):
                built, once, often, closed = [seen[rank] for seen in looks[model::2]]
                where = f"rank {rank}, model {'ab'[model]}"
                more = sorted(set(often["attached"]) - set(once["attached"]))
                self.require(not more, f"{where}: three more updates attached {', '.join(more)}")
                left = sorted(set(closed["attached"]) - set(built["attached"]))
                sharded = closed["parameters"] != built["parameters"]
                self.require(sharded or not left, f"{where}: close left {', '.join(left)}")


@CONTRACT.add
class OthersGroups(Clause):
    """A strategy reuses the caller's process group and never destroys it."""

    id = "LIFE-8"
    grouped_only = True

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [
            program(
                target,
                {"do": "make_process_group"},
                {"do": "world"},
                *trained(),
                *updates(1),
                SUM,
                {"do": "close"},
                {"do": "group_alive"},
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        for rank, alive in enumerate(execution.last("group_alive")):
            self.require(alive is True, f"rank {rank}: close destroyed the process group of the script")


@CONTRACT.add
class LocalRank(Clause):
    """An explicit local_rank takes precedence over the environment."""

    id = "LIFE-6"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        operations = (
            {"do": "environ", "LOCAL_RANK": "63"},
            {"do": "settings", "names": ["local_rank"]},
            SUM,
            {"do": "local_device"},
        )
        return [Program(operations=operations, settings={"local_rank": 0})]

    @override
    def check(self, execution: Execution) -> None:
        for rank in range(execution.target.world):
            local_rank, index = execution.at(rank, 3)
            fits = local_rank == 0 and index in (None, 0)
            self.require(fits, f"rank {rank}: expected local_rank=0 and device 0 or none, got {local_rank} and {index}")


@CONTRACT.add
class Geometry(Clause):
    """Batch sizes that do not divide evenly raise ConfigError on every rank. The message states the numbers and the
    rule."""

    id = "LIFE-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, 3, 3 * target.world + 1)] + (
            [self._program(target, 2, 2)] if target.world > 1 else []
        )

    def _program(self, target: Target, micro: int, total: int) -> Program:
        return Program(
            operations=({"do": "world", "may_fail": True},),
            settings={"micro_train_batch_size": micro, "train_batch_size": total},
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        # on one rank, a partial micro-batch; on several, a different number of micro-batches per rank
        micro, count = st.integers(2, 6), st.integers(1, 20)
        if target.world == 1:
            return st.builds(lambda size, n: self._program(target, size, size * n + 1), micro, count)
        return st.builds(lambda size, n: self._program(target, size, size * (n * target.world + 1)), micro, count)

    @override
    def check(self, execution: Execution) -> None:
        micro, total = (
            str(execution.program.settings[name]) for name in ("micro_train_batch_size", "train_batch_size")
        )
        for rank in range(execution.target.world):
            self.require_error(
                execution.at(rank, 0), "ConfigError", "train_batch_size", micro, total, where=f"rank {rank}"
            )


@CONTRACT.add
class StopRequested(Clause):
    """If SIGTERM reaches any rank inside saving_on_sigterm(save), stop_requested becomes True on all ranks at the same
    optimizer_step: the next one that applies or skips an update while no model has a pending gradient. If the block is then
    left normally, it calls save() on every rank. Nothing exits the process or closes the strategy, and the script's own
    handler is in place again."""

    id = "LIFE-10"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        last = target.world - 1
        return [
            self._program(target, "aaaaa", 2, last),
            self._program(target, "bbaab", 0, 0),
            self._program(target, "baab", 2, last, poison="nan"),  # b has a pending gradient when a is updated
            self._program(target, "aabb", 1, last, raising=True),
            self._program(target, "aab", 3, 0),  # too late for an update
        ]

    def _program(
        self, target: Target, models: str, position: int, rank: int, poison: str | None = None, raising: bool = False
    ) -> Program:
        """Micro-batches of ``models``, two an update, with SIGTERM before the one at ``position``."""
        turns = [micro_batch(number, model, poison=poison) for number, model in enumerate(models)]
        turns.insert(position, [{"do": "sigterm", "ranks": [rank]}])
        inside = [operation for turn in turns for operation in turn]
        block: Operation = {"do": "save_on_sigterm", "operations": inside, "raising": raising}
        after: list[Operation] = [{"do": "forward", "model": "a", "batch": 5}, SUM]
        return program(
            target, *trained("a"), *trained("b", seed=2), block, *after, accumulation_steps=2, max_skipped_updates=0
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda models, position, rank, raising: self._program(target, models, position, rank, raising=raising),
            st.text("ab", max_size=6), st.integers(0, 6), st.integers(0, target.world - 1), st.booleans(),
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        index, block, seen = next(iter(execution.each("save_on_sigterm")))
        requested = self._expected(block["operations"])
        saves = [0, int(requested[-1] and not block["raising"])]
        for rank, observed in enumerate(seen):
            self.require(
                observed["stop_requested"] == requested,
                f"rank {rank}: expected stop_requested {requested}, got {observed['stop_requested']}",
            )
            self.require(
                observed["saves"] == saves,
                f"rank {rank}: expected {saves} calls of save before and after the block is left, got {observed['saves']}",
            )
            self.require(
                observed["handler"], f"rank {rank}: expected the handler that was set before the block, got another"
            )
            execution.at(rank, index + 2)  # the strategy still works

    def _expected(self, operations: Sequence[Operation]) -> list[bool]:
        """stop_requested before the first operation and after each."""
        pending: set[str] = set()
        steps: Counter[str] = Counter()
        signalled, requested = False, [False]
        for operation in operations:
            stops = False
            signalled |= operation["do"] == "sigterm"
            if operation["do"] == "backward":
                pending.add(operation["model"])
            elif operation["do"] == "step":
                steps[operation["model"]] += 1
                if steps[operation["model"]] % 2 == 0:
                    pending.remove(operation["model"])
                    stops = signalled and not pending
            requested.append(requested[-1] or stops)
        return requested


@CONTRACT.add
class RankZeroOutput(Clause):
    """print and the logger write on rank 0 only."""

    id = "LOG-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [Program(operations=({"do": "print_and_log", "text": "hello there"},))]

    @override
    def check(self, execution: Execution) -> None:
        for rank, seen in enumerate(execution.last("print_and_log")):
            for how, text in seen.items():
                has_text = "hello there" in text
                self.require(
                    has_text == (rank == 0), f"rank {rank}: expected output on rank 0 only, got {text!r} {how}"
                )
