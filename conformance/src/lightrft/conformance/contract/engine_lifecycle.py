"""ENG: the lifecycle of a rollout engine."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error, show
from lightrft.conformance.contract.program_parts import program, trained, updates
from lightrft.conformance.contract.rollout_checks import GREEDY, generate, rollout, sleeps


@CONTRACT.add
class EngineStates(Clause):
    """The engine is absent, awake or asleep, and the strategy always reports the actual state, even after an exception.
    Sleeping and waking are idempotent. Generating and syncing wake the engine first. With enable_engine_sleep=False it
    stays awake."""

    id = "ENG-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        turns = [
            "sleep",
            "sleep",
            "wake",
            "wake",
            "sleep",
            "generate",
            "sleep",
            "sync",
            "bad generate",
            "sleep",
            "bad generate",
            "generate awake",
            "sleep",
        ]
        programs = [self._program(target, turns, sleeping) for sleeping in (True, False) if sleeping <= sleeps(target)]
        return programs if sleeps(target) else [*programs, self._refused(target)]

    def _refused(self, target: Target) -> Program:
        """An engine that cannot sleep is refused with enable_engine_sleep."""
        *model, setup = rollout(target)
        return program(target, *model, {**setup, "may_fail": True}, {"do": "status"}, enable_engine_sleep=True)

    def _program(self, target: Target, turns: Sequence[str], sleeping: bool) -> Program:
        calls: dict[str, Operation] = {
            "sleep": {"do": "sleep"},
            "wake": {"do": "wake"},
            "generate": generate(),
            "generate awake": {**generate(), "stay_awake": True},
            "sync": {"do": "sync", "model": "a"},
            "bad generate": {"do": "generate_raw", "sampling_params": GREEDY, "may_fail": True},
        }
        operations: list[Operation] = [{"do": "status"}, *rollout(target), {"do": "status"}]
        for turn in turns:
            operations += [calls[turn], {"do": "status"}]
        return program(target, *operations, enable_engine_sleep=sleeping)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        turn = st.sampled_from(["sleep", "wake", "generate", "generate awake", "sync", "bad generate"])
        return st.builds(
            lambda turns, sleeping: self._program(target, turns, sleeping),
            st.lists(turn, max_size=6),
            st.booleans() if sleeps(target) else st.just(False),
        )

    @override
    def check(self, execution: Execution) -> None:
        sleeping = execution.program.settings["enable_engine_sleep"]
        if sleeping and not sleeps(execution.target):
            self._check_refused(execution)
            return
        expected = "absent"
        for index, operation in enumerate(execution.program.operations):
            expected = self._after(expected, operation, sleeping)
            if operation["do"] == "status":
                for rank in range(execution.target.world):
                    status = execution.at(rank, index)
                    self.require(
                        status == expected,
                        f"rank {rank}: expected the engine to be {expected} (operation {index}), got {status}",
                    )
            else:
                for rank in range(execution.target.world):
                    self.require(
                        is_error(execution.at(rank, index)) == (operation["do"] == "generate_raw"),
                        f"rank {rank}: unexpected result of {operation['do']}: {show(execution.at(rank, index))}",
                    )

    def _check_refused(self, execution: Execution) -> None:
        for rank in range(execution.target.world):
            self.require_error(
                execution.last("engine")[rank],
                "LightRFTError",
                "enable_engine_sleep",
                where=f"rank {rank}, an engine that cannot sleep",
            )
            status = execution.last("status")[rank]
            self.require(
                status == "absent", f"rank {rank}: expected the engine to be absent after a refused setup, got {status}"
            )

    def _after(self, status: str, operation: Operation, sleeping: bool) -> str:
        do = operation["do"]
        if do in ("engine", "sleep") or (do == "generate" and not operation.get("stay_awake")):
            return "asleep" if sleeping else "awake"
        return "awake" if do in ("wake", "sync", "generate") else status


@CONTRACT.add
class UnknownEngine(Clause):
    """An unknown engine, or one that is not installed, raises an error that lists the available engines and the command
    that installs the missing one. No other engine is substituted."""

    id = "ENG-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        unknown = {"do": "engine", "kind": "no-such-engine", "actor": "a", "may_fail": True}
        missing = {"do": "missing_engine", "actor": "a", "may_fail": True}
        return [program(target, *trained(kind=target.language_model), unknown, missing, {"do": "status"})]

    @override
    def check(self, execution: Execution) -> None:
        for rank in range(execution.target.world):
            self.require_error(
                execution.last("engine")[rank], "LightRFTError", "no-such-engine", "fake", where=f"rank {rank}"
            )
            missing = execution.last("missing_engine")[rank]
            if missing is not None:
                self.require_error(
                    missing,
                    "BackendNotInstalledError",
                    "pip install",
                    where=f"rank {rank}, an engine that is not installed",
                )
            self.require(
                execution.last("status")[rank] == "absent",
                f"rank {rank}: expected the engine to be absent afterwards, got {execution.last('status')[rank]}",
            )


@CONTRACT.add
class NoEngine(Clause):
    """Without an engine, generating raises an error that names setup_inference_engine. Syncing does nothing and prints
    that there is no engine."""

    id = "ENG-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        local = {"do": "generate_local", "sampling": GREEDY, "token_ids": [[1, 2]], "may_fail": True}
        return [
            program(
                target,
                *trained(kind=target.language_model),
                {**generate(), "may_fail": True},
                local,
                {"do": "printed_by", "call": "sync", "model": "a"},
                {"do": "sleep"},
                {"do": "wake"},
                *updates(1),
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        for rank in range(execution.target.world):
            for do in ("generate", "generate_local"):
                self.require_error(
                    execution.last(do)[rank],
                    "EngineError",
                    "setup_inference_engine",
                    where=f"rank {rank}, {do} without an engine",
                )
            printed = execution.last("printed_by")[rank]
            self.require(
                ("no engine" in printed.lower()) == (rank == 0),
                f"rank {rank}: syncing without an engine: expected 'no engine' on rank 0 only, got {printed!r}",
            )
            self.require(
                execution.last("step")[rank]["applied"], f"rank {rank}: training without an engine applied no update"
            )
