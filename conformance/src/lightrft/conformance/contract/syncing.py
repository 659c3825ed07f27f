"""SYNC: the weights of the actor in the engine."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error
from lightrft.conformance.contract.drawing import FP32, SEEDS, geometry, trained, updates
from lightrft.conformance.contract.near import LOOK
from lightrft.conformance.contract.rollouts import Rollouts, alike, generate, rollout, sleeps


@CONTRACT.add
class SyncedWeights(Rollouts):
    """After update_engine_weights(actor), the engine's greedy tokens and log-probabilities are those of the actor's own
    weights as they were then, whatever training does next."""

    id = "SYNC-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, 1), self._program(place, 1, bucket=64)]

    def _program(self, place: Place, seed: int, bucket: int = 1 << 20, count: int = 2) -> Program:
        operations = (
            *rollout(place, seed),
            generate(),
            *updates(count),
            {"do": "sync", "model": "a"},
            generate(),
            LOOK,
            *updates(1, first=9),
            generate(),
        )
        return Program(operations=operations, settings={**FP32, "weight_sync_bucket_bytes": bucket, **geometry(place)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda seed, bucket, count: self._program(place, seed, bucket, count),
            SEEDS,
            st.sampled_from([1, 64, 500, 1 << 20]),
            st.integers(0, 2),
        )

    @override
    def check(self, trial: Trial) -> None:
        first, second, third = [index for index, it in enumerate(trial.program.operations) if it["do"] == "generate"]
        begun = models.build(trial.place.language_model, trial.program.operations[0]["seed"]).state_dict()
        self.check_greedy(trial, first, begun)
        for rank in range(trial.place.world):
            self.check_greedy(trial, second, trial.last("weights")[rank])
            self.check_greedy(trial, third, trial.last("weights")[rank])


@CONTRACT.add
class RightModel(Rollouts):
    """The model passed in is the model sent, whichever was sent before."""

    id = "SYNC-3"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, "bab")]

    def _program(self, place: Place, order: str) -> Program:
        operations = [
            *rollout(place, 1),
            *trained("b", place.language_model, seed=2, lr=0.05),
            *updates(1, model="a"),
            *updates(1, model="b"),
        ]
        for model in order:
            operations += [{"do": "sync", "model": model}, generate(), {"do": "weights", "model": model}]
        return Program(operations=tuple(operations), settings={**FP32, **geometry(place)})

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.text("ab", min_size=1, max_size=4).map(lambda order: self._program(place, order))

    @override
    def check(self, trial: Trial) -> None:
        for index, _, seen in trial.each("weights"):
            self.check_greedy(trial, index - 1, seen[0])


@CONTRACT.add
class Coverage(Clause):
    """Every trainable and frozen weight that the engine has is delivered once, under the name that a saved checkpoint
    has. Missing or unknown names are an error before the engine is touched."""

    id = "SYNC-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        other: list[Operation] = [*trained("b", "regressor", seed=2)]
        bad = {"do": "sync", "model": "b", "may_fail": True}
        operations = (*rollout(place), *other, generate(), bad, {"do": "version"}, generate())
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        before, after = [seen for _, _, seen in trial.each("generate")]
        for rank in range(trial.place.world):
            self.require_error(
                trial.last("sync")[rank], "EngineError", where=f"rank {rank}, syncing a model that is not the engine's"
            )
            self.require(
                trial.last("version")[rank] == 1,
                f"rank {rank}: the version is {trial.last('version')[rank]} after a refused sync, wanted 1",
            )
            self.require(alike(before[rank], after[rank]), f"rank {rank}: a refused sync changed the completions")


@CONTRACT.add
class Versions(Clause):
    """weight_version rises by one with each committed sync; completions carry the weight_version that made them."""

    id = "SYNC-4"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        sync = {"do": "sync", "model": "a"}
        return [
            Program(
                operations=(*rollout(place), {"do": "version"}, generate(), sync, sync, generate(), {"do": "version"}),
                settings={**FP32, **geometry(place)},
            )
        ]

    @override
    def check(self, trial: Trial) -> None:
        first, last = [seen for _, _, seen in trial.each("version")]
        made = [seen for _, _, seen in trial.each("generate")]
        for rank in range(trial.place.world):
            self.require(
                (first[rank], last[rank]) == (1, 3),
                f"rank {rank}: the versions are {first[rank]} and {last[rank]}, wanted 1 and 3",
            )
            for wanted, completions in zip((1, 3), made, strict=True):
                found = {it["version"] for it in completions[rank]}
                self.require(
                    found <= {wanted}, f"rank {rank}: completions carry the versions {sorted(found)}, wanted {wanted}"
                )


@CONTRACT.add
class Stale(Rollouts):
    """A failed or interrupted sync, or a sleep that dropped the weights, marks the engine stale, and generating from a
    stale engine raises StaleWeightsError, until a whole sync is committed."""

    id = "SYNC-8"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        ways = [
            [{"do": "broken_sync", "model": "a", "after": 2, "may_fail": True}],
            [{"do": "partial_sync", "model": "a", "leave_out": 1, "may_fail": True}],
            *([[{"do": "sleep", "level": 2}]] if 2 in place.sleep_levels else []),
        ]
        return [self._program(place, way) for way in ways]

    def _program(self, place: Place, way: Sequence[Operation]) -> Program:
        operations = (
            *rollout(place),
            *way,
            {**generate(), "may_fail": True},
            {"do": "sync", "model": "a"},
            generate(),
            LOOK,
        )
        settings = {**FP32, "enable_engine_sleep": sleeps(place), **geometry(place)}
        return Program(operations=operations, settings=settings)

    @override
    def check(self, trial: Trial) -> None:
        stale, fresh = [index for index, it in enumerate(trial.program.operations) if it["do"] == "generate"]
        for rank in range(trial.place.world):
            for index, operation in enumerate(trial.program.operations):
                if operation["do"] in ("broken_sync", "partial_sync"):
                    self.require(is_error(trial.at(rank, index)), f"rank {rank}: {operation['do']} raised nothing")
            observed = trial.at(rank, stale)
            self.require_error(observed, "StaleWeightsError", where=f"rank {rank}, generating from a stale engine")
        self.check_greedy(trial, fresh, trial.last("weights")[0])


@CONTRACT.add
class SyncedTogether(Clause):
    """A sync counts where it ended well on every rank: where it failed on one, all raise, no engine generates until a
    whole sync is committed, and the versions stay alike."""

    id = "SYNC-9"
    smallest_world = 2

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        sync: Operation = {"do": "sync", "model": "a"}
        local: Operation = {"do": "generate_local", "sampling": {"max_tokens": 1}, "token_ids": [[1]]}
        operations = (
            *trained(),
            {"do": "engine", "kind": "lightrft.conformance.echo:FrailEngine", "actor": "a"},
            {"do": "version"},
            {**sync, "may_fail": True},
            {**local, "may_fail": True},
            {"do": "version"},
            sync,
            local,
            {"do": "version"},
        )
        return [Program(operations=operations, settings={**FP32, "weight_sync_bucket_bytes": 64, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        begun, failed, committed = [seen for _, _, seen in trial.each("version")]
        for rank in range(trial.place.world):
            where = f"rank {rank}, where the sync failed on rank 1"
            self.require(is_error(trial.last_of("sync", 0)[rank]), f"{where}: nothing was raised")
            self.require_error(trial.last_of("generate_local", 0)[rank], "StaleWeightsError", where=where)
            self.require(failed[rank] == begun[rank], f"{where}: the version went from {begun[rank]} to {failed[rank]}")
            found = trial.last("generate_local")[rank][0]["version"]
            self.require(
                found == committed[rank] == begun[rank] + 1,
                f"rank {rank}: after the next sync the version is {committed[rank]}, and completions say {found}; "
                f"wanted {begun[rank] + 1}",
            )


@CONTRACT.add
class Caches(Rollouts):
    """Caches of what an engine has computed for a prompt never outlive the weights that filled them."""

    id = "SYNC-5"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        long = [
            (7 * index) % models.VOCABULARY for index in range(40)
        ]  # longer than the blocks in which prefixes are kept
        again = generate([[long, [*long, 3], long[:33]]], max_tokens=3)
        sync: Operation = {"do": "sync", "model": "a"}
        operations = (
            *rollout(place),
            again,
            again,
            LOOK,
            *updates(2),
            sync,
            again,
            LOOK,
            *updates(1),
            sync,
            again,
            LOOK,
        )
        return [Program(operations=operations, settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        for index, _, seen in trial.each("weights"):
            generated = max(at for at, it in enumerate(trial.program.operations[:index]) if it["do"] == "generate")
            for rank in range(trial.place.world):
                self.check_greedy(trial, generated, seen[rank])


@CONTRACT.add
class SyncMemory(Clause):
    """Syncing needs at most 2 x max(weight_sync_bucket_bytes, largest tensor) in each process, beyond what it holds at
    rest."""

    id = "SYNC-6"
    bucket = 16 << 20
    slack = 12 << 20
    """What an allocator, a process group and Python may keep for themselves."""

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        operations = (
            *trained(kind="deep"),
            {"do": "engine", "kind": "lightrft.conformance.echo:EchoEngine", "actor": "a"},
            {"do": "measured_sync", "model": "a"},
        )
        settings = {**FP32, "weight_sync_bucket_bytes": self.bucket, **geometry(place)}
        return [Program(operations=operations, settings=settings)]

    @override
    def check(self, trial: Trial) -> None:
        bound = 2 * self.bucket + self.slack
        for rank, taken in enumerate(trial.last("measured_sync")):
            self.require(
                taken <= bound,
                f"rank {rank}: syncing took {taken / 2**20:.0f} MiB, more than {bound / 2**20:.0f}; a bucket has "
                f"{self.bucket / 2**20:.0f}, the model {8 * self.bucket / 2**20:.0f}",
            )
