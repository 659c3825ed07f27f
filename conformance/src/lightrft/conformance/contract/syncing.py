"""SYNC: sending the actor's weights to the engine."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error
from lightrft.conformance.contract.bounded_memory import BoundedMemory
from lightrft.conformance.contract.buffers import read_buffers
from lightrft.conformance.contract.program_parts import SEEDS, program, trained, updates
from lightrft.conformance.contract.reference_checks import READ_WEIGHTS
from lightrft.conformance.contract.rollout_checks import Rollouts, generate, rollout, same_completions, sleeps
from lightrft.conformance.language_models import VOCABULARY


@CONTRACT.add
class SyncedWeights(Rollouts):
    """After update_engine_weights(actor), the engine's greedy tokens and log-probabilities are those of the actor's
    weights and persistent buffers at that time, whatever training does next."""

    id = "SYNC-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        programs = [self._program(target, 1), self._program(target, 1, bucket=64)]
        takes_any = target.language_model == "language" and target.world == 1  # each rank has its own buffers
        return [*programs, self._program(replace(target, language_model="centred"), 1)] if takes_any else programs

    def _program(self, target: Target, seed: int, bucket: int = 1 << 20, count: int = 2) -> Program:
        return program(
            target,
            *rollout(target, seed),
            generate(),
            *updates(count),
            {"do": "sync", "model": "a"},
            generate(),
            READ_WEIGHTS,
            read_buffers(),
            *updates(1, first=9),
            generate(),
            weight_sync_bucket_bytes=bucket,
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda seed, bucket, count: self._program(target, seed, bucket, count),
            SEEDS,
            st.sampled_from([1, 64, 500, 1 << 20]),
            st.integers(0, 2),
        )

    @override
    def check(self, execution: Execution) -> None:
        first, second, third = [
            index for index, operation in enumerate(execution.program.operations) if operation["do"] == "generate"
        ]
        build = execution.program.operations[0]
        self.check_greedy(execution, first, models.build(build["kind"], build["seed"]).state_dict())
        for rank in range(execution.target.world):
            state = {**execution.last("weights")[rank], **execution.last("buffers")[rank]}
            self.check_greedy(execution, second, state)
            self.check_greedy(execution, third, state)


@CONTRACT.add
class RightModel(Rollouts):
    """A sync sends the model that was passed in, whichever model was sent before."""

    id = "SYNC-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, "bab")]

    def _program(self, target: Target, order: str) -> Program:
        operations = [
            *rollout(target, 1),
            *trained("b", target.language_model, seed=2, lr=0.05),
            *updates(1, model="a"),
            *updates(1, model="b"),
        ]
        for model in order:
            operations += [{"do": "sync", "model": model}, generate(), {"do": "weights", "model": model}]
        return program(target, *operations)

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.text("ab", min_size=1, max_size=4).map(lambda order: self._program(target, order))

    @override
    def check(self, execution: Execution) -> None:
        for index, _, seen in execution.each("weights"):
            self.check_greedy(execution, index - 1, seen[0])


@CONTRACT.add
class Coverage(Clause):
    """Every weight of the actor, trainable or frozen, is delivered to the engine once, under its checkpoint name. A
    missing or unknown name raises before the engine changes."""

    id = "SYNC-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        other: list[Operation] = [*trained("b", "regressor", seed=2)]
        bad = {"do": "sync", "model": "b", "may_fail": True}
        return [program(target, *rollout(target), *other, generate(), bad, {"do": "version"}, generate())]

    @override
    def check(self, execution: Execution) -> None:
        before, after = [seen for _, _, seen in execution.each("generate")]
        for rank in range(execution.target.world):
            self.require_error(
                execution.last("sync")[rank],
                "EngineError",
                where=f"rank {rank}, syncing a model other than the engine's",
            )
            self.require(
                execution.last("version")[rank] == 1,
                f"rank {rank}: after a refused sync, expected version 1, got {execution.last('version')[rank]}",
            )
            self.require(
                same_completions(before[rank], after[rank]), f"rank {rank}: a refused sync changed the completions"
            )


@CONTRACT.add
class Versions(Clause):
    """weight_version increases by one with each committed sync. Completions carry the weight_version that generated
    them."""

    id = "SYNC-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        sync = {"do": "sync", "model": "a"}
        failed = {"do": "broken_sync", "model": "a", "after": 2, "may_fail": True}
        return [
            program(
                target,
                *rollout(target),
                {"do": "version"},
                generate(),
                sync,
                failed,
                sync,
                generate(),
                {"do": "version"},
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        first, last = [seen for _, _, seen in execution.each("version")]
        made = [seen for _, _, seen in execution.each("generate")]
        for rank in range(execution.target.world):
            self.require(
                (first[rank], last[rank]) == (1, 3),
                f"rank {rank}: expected the versions 1 and 3, got {first[rank]} and {last[rank]}",
            )
            for wanted, completions in zip((1, 3), made, strict=True):
                versions = {completion["version"] for completion in completions[rank]}
                self.require(
                    versions <= {wanted},
                    f"rank {rank}: expected completions of version {wanted}, got {sorted(versions)}",
                )


@CONTRACT.add
class StaleEngine(Rollouts):
    """A failed or interrupted sync, or a sleep that discards the weights, marks the engine as stale. Generating from a
    stale engine raises StaleWeightsError until a complete sync is committed."""

    id = "SYNC-8"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        ways = [
            [{"do": "broken_sync", "model": "a", "after": 2, "may_fail": True}],
            [{"do": "partial_sync", "model": "a", "leave_out": 1, "may_fail": True}],
            *([[{"do": "sleep", "level": 2}]] if 2 in target.sleep_levels else []),
        ]
        return [self._program(target, way) for way in ways]

    def _program(self, target: Target, way: Sequence[Operation]) -> Program:
        operations = (
            *rollout(target),
            *way,
            {**generate(), "may_fail": True},
            {"do": "sync", "model": "a"},
            generate(),
            READ_WEIGHTS,
        )
        return program(target, *operations, enable_engine_sleep=sleeps(target))

    @override
    def check(self, execution: Execution) -> None:
        stale, fresh = [
            index for index, operation in enumerate(execution.program.operations) if operation["do"] == "generate"
        ]
        for rank in range(execution.target.world):
            for index, operation in enumerate(execution.program.operations):
                if operation["do"] in ("broken_sync", "partial_sync"):
                    self.require(
                        is_error(execution.at(rank, index)),
                        f"rank {rank}: {operation['do']}: expected an error, got none",
                    )
            observed = execution.at(rank, stale)
            self.require_error(observed, "StaleWeightsError", where=f"rank {rank}, generating from a stale engine")
        self.check_greedy(execution, fresh, execution.last("weights")[0])


@CONTRACT.add
class SyncedTogether(Clause):
    """A sync is committed only if it succeeds on every rank. If it fails on one rank, all ranks raise, no engine
    generates until a complete sync is committed, and all ranks keep the same version."""

    id = "SYNC-9"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        sync: Operation = {"do": "sync", "model": "a"}
        local: Operation = {"do": "generate_local", "sampling": {"max_tokens": 1}, "token_ids": [[1]]}
        return [
            program(
                target,
                *trained(),
                {"do": "engine", "kind": "lightrft.conformance.echo:FailingSyncEngine", "actor": "a"},
                {"do": "version"},
                {**sync, "may_fail": True},
                {**local, "may_fail": True},
                {"do": "version"},
                sync,
                local,
                {"do": "version"},
                weight_sync_bucket_bytes=64,
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        initial, failed, committed = [seen for _, _, seen in execution.each("version")]
        for rank in range(execution.target.world):
            where = f"rank {rank}, after a sync that failed on rank 1"
            self.require(is_error(execution.last_of("sync", 0)[rank]), f"{where}: expected an error, got none")
            self.require_error(execution.last_of("generate_local", 0)[rank], "StaleWeightsError", where=where)
            self.require(
                failed[rank] == initial[rank], f"{where}: expected version {initial[rank]}, got {failed[rank]}"
            )
            versions = (committed[rank], execution.last("generate_local")[rank][0]["version"])
            self.require(
                versions == (initial[rank] + 1,) * 2,
                f"rank {rank}: after the next sync, expected version {initial[rank] + 1} of engine and completions, got {versions}",
            )


@CONTRACT.add
class NoStaleCaches(Rollouts):
    """Cached results for a prompt never outlive the weights that produced them."""

    id = "SYNC-5"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        long = [(7 * index) % VOCABULARY for index in range(40)]  # longer than a block of a prefix cache
        again = generate([[long, [*long, 3], long[:33]]], max_tokens=3)
        sync: Operation = {"do": "sync", "model": "a"}
        return [
            program(
                target,
                *rollout(target),
                again,
                again,
                READ_WEIGHTS,
                *updates(2),
                sync,
                again,
                READ_WEIGHTS,
                *updates(1),
                sync,
                again,
                READ_WEIGHTS,
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        for index, _, seen in execution.each("weights"):
            generated = max(
                at for at, operation in enumerate(execution.program.operations[:index]) if operation["do"] == "generate"
            )
            for rank in range(execution.target.world):
                self.check_greedy(execution, generated, seen[rank])


@CONTRACT.add
class SyncMemory(BoundedMemory):
    """Syncing adds at most 2 x max(weight_sync_bucket_bytes, largest tensor) to the memory of each process."""

    id = "SYNC-6"
    measured = "measured_sync"
    before = ({"do": "engine", "kind": "lightrft.conformance.echo:EchoEngine", "actor": "a"},)
