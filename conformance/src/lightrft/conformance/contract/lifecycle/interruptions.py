"""Lost ranks, and signals."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error
from lightrft.conformance.contract.program_parts import SUM, geometry, micro_batch, program, trained, updates

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
    first update or a later one, the others raise within the configured timeout. The message names the operation that
    was waiting. Nothing waits forever."""

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
class StopRequested(Clause):
    """If SIGTERM reaches any rank inside saving_on_sigterm(save), stop_requested becomes True on all ranks at the same
    optimizer_step: the next one that applies or skips an update while no model has a pending gradient. If the block is
    then left normally, it calls save() on every rank. The process does not exit, the strategy stays open, and the
    script's own signal handler is restored."""

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
        """Micro-batches of ``models``, two per update, with SIGTERM before the one at ``position``."""
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
