"""ENG: the life of a rollout engine."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, show
from lightrft.conformance.contract.drawing import FP32, geometry, trained, updates
from lightrft.conformance.contract.rollouts import GREEDY, SLEEPING, generate, rollout, sleeps


@CONTRACT.add
class EngineLife(Clause):
    """The engine is absent, awake or asleep, and the strategy's word for it is always true, after exceptions too. sleep
    and wake are idempotent; generating or syncing wakes it first; with enable_engine_sleep=False it stays awake."""

    id = "ENG-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
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
        programs = [self._program(place, turns, sleeping) for sleeping in (True, False) if sleeping <= sleeps(place)]
        return programs if sleeps(place) else [*programs, self._refused(place)]

    def _refused(self, place: Place) -> Program:
        """An engine that cannot sleep is not set up as one that does."""
        *model, setup = rollout(place)
        operations = (*model, {**setup, "may_fail": True}, {"do": "status"})
        return Program(operations=operations, settings={**FP32, **SLEEPING, **geometry(place)})

    def _program(self, place: Place, turns: Sequence[str], sleeping: bool) -> Program:
        calls: dict[str, Operation] = {
            "sleep": {"do": "sleep"},
            "wake": {"do": "wake"},
            "generate": generate(),
            "generate awake": {**generate(), "stay_awake": True},
            "sync": {"do": "sync", "model": "a"},
            "bad generate": {"do": "generate_raw", "sampling_params": GREEDY, "may_fail": True},
        }
        operations: list[Operation] = [{"do": "status"}, *rollout(place), {"do": "status"}]
        for turn in turns:
            operations += [calls[turn], {"do": "status"}]
        return Program(
            operations=tuple(operations), settings={**FP32, "enable_engine_sleep": sleeping, **geometry(place)}
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        turn = st.sampled_from(["sleep", "wake", "generate", "generate awake", "sync", "bad generate"])
        return st.builds(
            lambda turns, sleeping: self._program(place, turns, sleeping),
            st.lists(turn, max_size=6),
            st.booleans() if sleeps(place) else st.just(False),
        )

    @override
    def check(self, trial: Trial) -> None:
        sleeping = trial.program.settings["enable_engine_sleep"]
        if sleeping and not sleeps(trial.place):
            self._check_refused(trial)
            return
        expected = "absent"
        for index, operation in enumerate(trial.program.operations):
            expected = self._after(expected, operation, sleeping)
            if operation["do"] == "status":
                for rank in range(trial.place.world):
                    found = trial.at(rank, index)
                    self.require(
                        found == expected, f"rank {rank}: the engine is {found} (operation {index}), wanted {expected}"
                    )
            else:
                for rank in range(trial.place.world):
                    self.require(
                        is_error(trial.at(rank, index)) == (operation["do"] == "generate_raw"),
                        f"rank {rank}: {operation['do']} gave {show(trial.at(rank, index))}",
                    )

    def _check_refused(self, trial: Trial) -> None:
        for rank in range(trial.place.world):
            self.require_error(
                trial.last("engine")[rank],
                "LightRFTError",
                "enable_engine_sleep",
                where=f"rank {rank}, an engine that cannot sleep",
            )
            found = trial.last("status")[rank]
            self.require(found == "absent", f"rank {rank}: the engine is {found} after a refused setup, wanted absent")

    def _after(self, status: str, operation: Operation, sleeping: bool) -> str:
        do = operation["do"]
        if do in ("engine", "sleep") or (do == "generate" and not operation.get("stay_awake")):
            return "asleep" if sleeping else "awake"
        return "awake" if do in ("wake", "sync", "generate") else status


@CONTRACT.add
class UnknownEngine(Clause):
    """An unknown engine, or one that is not installed, raises an error with the names that are and the command that
    installs it; no other engine takes its place."""

    id = "ENG-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        unknown = {"do": "engine", "kind": "no-such-engine", "actor": "a", "may_fail": True}
        missing = {"do": "missing_engine", "actor": "a", "may_fail": True}
        operations = (*trained(kind=place.language_model), unknown, missing, {"do": "status"})
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        for rank in range(trial.place.world):
            self.require_error(
                trial.last("engine")[rank], "LightRFTError", "no-such-engine", "fake", where=f"rank {rank}"
            )
            missing = trial.last("missing_engine")[rank]
            if missing is not None:
                where = f"rank {rank}, an engine that is not installed"
                self.require_error(missing, "BackendNotInstalledError", "pip install", where=where)
            self.require(
                trial.last("status")[rank] == "absent",
                f"rank {rank}: the engine is {trial.last('status')[rank]} afterwards",
            )


@CONTRACT.add
class NoEngine(Clause):
    """Without an engine, generating raises a clear error; syncing is a no-op that says so."""

    id = "ENG-3"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        local = {"do": "generate_local", "sampling": GREEDY, "token_ids": [[1, 2]], "may_fail": True}
        operations = (
            *trained(kind=place.language_model),
            {**generate(), "may_fail": True},
            local,
            {"do": "heard", "call": "sync", "model": "a"},
            {"do": "sleep"},
            {"do": "wake"},
            *updates(1),
        )
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        for rank in range(trial.place.world):
            for do in ("generate", "generate_local"):
                self.require_error(
                    trial.last(do)[rank],
                    "EngineError",
                    "setup_inference_engine",
                    where=f"rank {rank}, {do} without an engine",
                )
            heard = trial.last("heard")[rank]
            self.require(
                ("no engine" in heard.lower()) == (rank == 0), f"rank {rank}: syncing without an engine said {heard!r}"
            )
            self.require(trial.last("step")[rank]["applied"], "training without an engine")
