"""What a save stores, and what it does not change."""

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
    RESTART,
    OnDisk,
    loaded,
    saved,
)
from lightrft.conformance.contract.program_parts import trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS


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
class SavingChangesNothing(OnDisk):
    """Saving changes no parameter, gradient, optimizer state or random state. Every rank returns the same path."""

    id = "CKPT-9"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, asynchronous) for asynchronous in (False, True)]

    def _program(self, target: Target, asynchronous: bool) -> Program:
        around: list[Operation] = [
            {"do": "draw"}, *updates(2, scheduled=True), {"do": "state", "model": "a"}, saved(),
            {"do": "state", "model": "a"}, *updates(1, first=9, scheduled=True), READ_WEIGHTS,
        ]  # fmt: skip
        without: list[Operation] = [operation for operation in around if operation["do"] != "save"]
        return self.program(
            target,
            *trained(schedule=True),
            *around,
            RESTART,
            *trained(schedule=True),
            *without,
            async_ckpt=asynchronous,
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
class Asynchronous(OnDisk):
    """An asynchronous save stores the state at the time of the call, buffers and client_state included, whatever
    training does next. A second save, close() and a load wait for it."""

    id = "CKPT-12"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, ending) for ending in ("load", "save", "close")]

    def _program(self, target: Target, ending: str) -> Program:
        endings: dict[str, list[Operation]] = {
            "load": [],
            "save": [saved("u"), {"do": "visible_names"}],
            "close": [RESTART, *trained(schedule=True, kind="running statistics")],
        }
        setup = trained(schedule=True, kind="running statistics")
        states: list[Operation] = [{"do": "state", "model": "a"}]
        return self.program(
            target, *setup, *updates(1, scheduled=True), *states, saved(client="plain"),
            *updates(1, first=7, scheduled=True), *endings[ending], loaded(client="plain"), *states, async_ckpt=True,
        )  # fmt: skip

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(lambda ending: self._program(target, ending), st.sampled_from(["load", "save", "close"]))

    @override
    def check(self, execution: Execution) -> None:
        before, after = (seen for _, _, seen in execution.each("state"))
        for rank, (one, other) in enumerate(zip(before, after, strict=True)):
            self.require_same(one, other, f"rank {rank}: expected the state at the time of the save")
        for rank, seen in enumerate(execution.last("load")):
            self.require(seen["client"], f"rank {rank}: expected the client_state at the time of the save, got another")
        for _, _, seen in execution.each("visible_names"):
            self.require("t" in seen[0], f"a second save started before the first was committed: {seen[0]}")
