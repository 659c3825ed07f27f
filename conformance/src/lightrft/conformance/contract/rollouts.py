"""Rollouts: what the clauses about engines, weight sync and generation have in common."""

from collections.abc import Sequence
from typing import Any

import torch

from lightrft.conformance import models, reference
from lightrft.conformance.clause import Clause, Operation, Place, Trial, same
from lightrft.conformance.contract.drawing import trained

GREEDY = {"temperature": 0.0, "max_tokens": 5}
PROMPTS = [[[1, 2, 3], [4]], [[5, 6]], [], [[7, 8, 9, 10]]]
SLEEPING = {"enable_engine_sleep": True}


def rollout(place: Place, seed: int = 1, lr: float = 0.05, before: str = "") -> list[Operation]:
    """A language model in training, and an engine with its weights. ``before`` stands before the model's kind."""
    return [
        *trained(kind=before + place.language_model, seed=seed, lr=lr),
        {"do": "engine", "kind": place.engine, "actor": "a"},
    ]


def generate(prompts: Sequence[Any] = PROMPTS, **sampling: Any) -> Operation:
    """Each rank's own prompts, greedily but for ``sampling``."""
    return {"do": "generate", "prompts": list(prompts), "sampling": {**GREEDY, **sampling}}


def sleeps(place: Place) -> bool:
    """Whether the engine can give its memory back."""
    return 1 in place.sleep_levels


def model_with(place: Place, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A plain language model with these weights."""
    model = models.build(place.language_model, 0)
    model.load_state_dict(weights, strict=False)
    return model


def alike(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two calls gave the same completions. An engine that keeps the beginnings of prompts computes in another
    order the second time: log-probabilities agree as closely as with the reference."""

    def rest(completions: Sequence[Any]) -> list[Any]:
        return [{name: value for name, value in it.items() if name != "logprobs"} for it in completions]

    pairs = zip(left, right, strict=False)
    return same(rest(left), rest(right)) and all(
        torch.allclose(one["logprobs"], other["logprobs"], rtol=0, atol=1e-4) for one, other in pairs
    )


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
