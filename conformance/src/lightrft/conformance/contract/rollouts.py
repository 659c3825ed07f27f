"""ENG, SYNC and GEN: rollouts."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models, reference
from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, same, show
from lightrft.conformance.contract.drawing import FP32, SEEDS, geometry, trained, updates
from lightrft.conformance.contract.near import LOOK

GREEDY = {"temperature": 0.0, "max_tokens": 5}
PROMPTS = [[[1, 2, 3], [4]], [[5, 6]], [], [[7, 8, 9, 10]]]
SLEEPING = {"enable_engine_sleep": True}


def rollout(place: Place, seed: int = 1, lr: float = 0.05) -> list[Operation]:
    """A language model in training, and an engine with its weights."""
    return [*trained(kind=place.language_model, seed=seed, lr=lr), {"do": "engine", "kind": place.engine, "actor": "a"}]


def generate(prompts: Sequence[Any] = PROMPTS, **sampling: Any) -> Operation:
    """Each rank's own prompts, greedily but for ``sampling``."""
    return {"do": "generate", "prompts": list(prompts), "sampling": {**GREEDY, **sampling}}


def _sleeps(place: Place) -> bool:
    """Whether the engine can give its memory back."""
    return 1 in place.sleep_levels


def model_with(place: Place, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A plain language model with these weights."""
    model = models.build(place.language_model, 0)
    model.load_state_dict(weights, strict=False)
    return model


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
        programs = [self._program(place, turns, sleeping) for sleeping in (True, False) if sleeping <= _sleeps(place)]
        return programs if _sleeps(place) else [*programs, self._refused(place)]

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
            st.booleans() if _sleeps(place) else st.just(False),
        )

    @override
    def check(self, trial: Trial) -> None:
        sleeping = trial.program.settings["enable_engine_sleep"]
        if sleeping and not _sleeps(trial.place):
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
        return [
            Program(
                operations=(*trained(kind=place.language_model), unknown, {"do": "status"}),
                settings={**FP32, **geometry(place)},
            )
        ]

    @override
    def check(self, trial: Trial) -> None:
        for rank in range(trial.place.world):
            observed = next(
                trial.at(rank, index) for index, it in enumerate(trial.program.operations) if it["do"] == "engine"
            )
            self.require_error(observed, "LightRFTError", "no-such-engine", "fake", where=f"rank {rank}")
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


class Rollouts(Clause):
    """What the clauses that look at completions have in common."""

    def check_greedy(self, trial: Trial, generated: int, weights: dict[str, torch.Tensor]) -> None:
        """Require the completions of operation ``generated`` to be the reference's under ``weights``."""
        model, operation = model_with(trial.place, weights), trial.program.operations[generated]
        for rank in range(trial.place.world):
            own = operation["prompts"][rank % len(operation["prompts"])]
            seen = trial.at(rank, generated)
            self.require(len(seen) == len(own), f"rank {rank}: {len(own)} prompts gave {len(seen)} completions")
            for prompt, completion in zip(own, seen, strict=True):
                tokens, logprobs = reference.greedy(model, prompt, operation["sampling"]["max_tokens"])
                self.require(
                    completion["prompt"] == prompt,
                    f"rank {rank}: the completion of {prompt} says that it is of {completion['prompt']}",
                )
                self.require(
                    completion["tokens"] == tokens,
                    f"rank {rank}: {prompt} gave {completion['tokens']}, wanted {tokens}",
                )
                worst = max(abs(a - b) for a, b in zip(completion["logprobs"].tolist(), logprobs, strict=True))
                self.require(worst <= 1e-4, f"rank {rank}: log-probabilities of {prompt} differ by {worst:.3g}")


@CONTRACT.add
class SyncedWeights(Rollouts):
    """After update_engine_weights(actor), the engine's greedy tokens and log-probabilities are those of the actor's own
    weights."""

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
        first, second = [index for index, it in enumerate(trial.program.operations) if it["do"] == "generate"]
        begun = models.build(trial.place.language_model, trial.program.operations[0]["seed"]).state_dict()
        self.check_greedy(trial, first, begun)
        for rank in range(trial.place.world):
            self.check_greedy(trial, second, trial.last("weights")[rank])


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
            self.require(same(before[rank], after[rank]), f"rank {rank}: a refused sync changed the completions")


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
        settings = {**FP32, "enable_engine_sleep": _sleeps(place), **geometry(place)}
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
class OwnCompletions(Rollouts):
    """Each rank gets its own prompts' completions, in order, whatever the ranks' counts are (0 too); with n samples per
    prompt, n in a row per prompt."""

    id = "GEN-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, PROMPTS, 1), self._program(place, PROMPTS, 3)]

    def _program(self, place: Place, prompts: Sequence[Any], samples: int) -> Program:
        return Program(
            operations=(*rollout(place), {**generate(prompts, n=samples)}), settings={**FP32, **geometry(place)}
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        prompt = st.lists(st.integers(0, models.VOCABULARY - 1), min_size=1, max_size=5)
        counts = st.lists(st.lists(prompt, max_size=4), min_size=place.world, max_size=place.world)
        return st.builds(lambda prompts, n: self._program(place, prompts, n), counts, st.integers(1, 3))

    @override
    def check(self, trial: Trial) -> None:
        operation = trial.program.operations[-1]
        model, samples = models.build(trial.place.language_model, 1), operation["sampling"]["n"]
        for rank, seen in enumerate(trial.last("generate")):
            own = [prompt for prompt in operation["prompts"][rank % len(operation["prompts"])] for _ in range(samples)]
            self.require(
                [it["prompt"] for it in seen] == own,
                f"rank {rank}: completions of {[it['prompt'] for it in seen]}, wanted {own}",
            )
            for prompt, completion in zip(own, seen, strict=True):
                tokens, _ = reference.greedy(model, prompt, GREEDY["max_tokens"])  # type: ignore[arg-type]
                self.require(
                    completion["tokens"] == tokens,
                    f"rank {rank}: {prompt} gave {completion['tokens']}, wanted {tokens}",
                )


@CONTRACT.add
class Repeatable(Clause):
    """Greedy generation repeats; a seed makes sampling repeat, and another seed, or none, draws anew."""

    id = "GEN-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        hot: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12, "n": 2}  # no engine has to take more
        looks = [
            generate(),
            generate(),
            generate(**hot, seed=3),
            generate(**hot, seed=3),
            generate(**hot, seed=4),
            generate(**hot),
            generate(**hot),
        ]
        return [Program(operations=(*rollout(place), *looks), settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        greedy, greedy_again, seeded, seeded_again, other, free, free_again = [
            seen for _, _, seen in trial.each("generate")
        ]
        for rank in range(trial.place.world):
            if not greedy[rank]:
                continue
            self.require(same(greedy[rank], greedy_again[rank]), f"rank {rank}: greedy generation does not repeat")
            self.require(same(seeded[rank], seeded_again[rank]), f"rank {rank}: sampling with a seed does not repeat")
            for left, right, what in [(seeded, other, "two seeds"), (free, free_again, "two calls without a seed")]:
                differ = _tokens(left[rank]) != _tokens(right[rank])
                self.require(differ, f"rank {rank}: {what} drew the same {_tokens(left[rank])}")
            samples = _tokens(seeded[rank])
            self.require(samples[0] != samples[1], f"rank {rank}: the samples of one prompt are all {samples[0]}")


def _tokens(completions: Sequence[Any]) -> list[list[int]]:
    return [it["tokens"] for it in completions]


@CONTRACT.add
class EitherOr(Clause):
    """engine_generate_local takes token ids or multimodal inputs: neither or both is a ValueError."""

    id = "GEN-3"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        call: Operation = {"do": "generate_local", "sampling": GREEDY, "may_fail": True}
        both = {**call, "token_ids": [[1]], "inputs": [{"prompt": "x"}]}
        return [
            Program(
                operations=(
                    *rollout(place),
                    call,
                    both,
                    {**call, "token_ids": [[1, 2]]},
                    {**call, "token_ids": [3, 4]},
                ),
                settings={**FP32, **geometry(place)},
            )
        ]

    @override
    def check(self, trial: Trial) -> None:
        neither, both, right, flat = [seen for _, _, seen in trial.each("generate_local")]
        for rank in range(trial.place.world):
            self.require_error(neither[rank], "ValueError", "prompt_token_ids", where=f"rank {rank}, neither")
            self.require_error(both[rank], "ValueError", "prompt_token_ids", where=f"rank {rank}, both")
            self.require(
                not is_error(right[rank]) and right[rank][0]["prompt"] == [1, 2], f"rank {rank}: {show(right[rank])}"
            )
            self.require(
                not is_error(flat[rank]) and flat[rank][0]["prompt"] == [3, 4], f"rank {rank}: {show(flat[rank])}"
            )


@CONTRACT.add
class Agreement(Clause):
    """Log-probabilities come back with the tokens, and agree with the training model's within the dtype's tolerance."""

    id = "GEN-6"
    level = "SHOULD"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [
            Program(
                operations=(*rollout(place), generate(temperature=1.2, top_p=0.9, seed=5, max_tokens=8)),
                settings={**FP32, **geometry(place)},
            )
        ]

    @override
    def check(self, trial: Trial) -> None:
        model = models.build(trial.place.language_model, 1)
        for rank, seen in enumerate(trial.last("generate")):
            for it in seen:
                self.require(it["logprobs"] is not None, f"rank {rank}: no log-probabilities")
                wanted = torch.tensor(reference.score(model, it["prompt"], it["tokens"]), dtype=torch.float64)
                worst = (it["logprobs"] - wanted).abs().max().item()
                self.require(
                    worst <= 1e-4, f"rank {rank}: log-probabilities differ by {worst:.3g} from the training model's"
                )
