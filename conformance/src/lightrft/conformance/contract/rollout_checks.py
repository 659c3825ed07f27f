"""What the clauses about engines, weight sync and generation share."""

from collections.abc import Sequence

import torch

from lightrft.conformance import decoding, models
from lightrft.conformance.clause import Clause, Execution, Operation, Record, Target, same
from lightrft.conformance.contract.program_parts import trained

GREEDY = {"temperature": 0.0, "max_tokens": 5}
PROMPTS = [[[1, 2, 3], [4]], [[5, 6]], [], [[7, 8, 9, 10]]]
SLEEPING = {"enable_engine_sleep": True}


def rollout(target: Target, seed: int = 1, lr: float = 0.05, before: str = "") -> list[Operation]:
    """A language model in training, and an engine with its weights. ``before`` is a prefix of the model's kind."""
    return [
        *trained(kind=before + target.language_model, seed=seed, lr=lr),
        {"do": "engine", "kind": target.engine, "actor": "a"},
    ]


def generate(prompts: Sequence[object] = PROMPTS, **sampling: object) -> Operation:
    """Generate for each rank's own prompts, greedily unless ``sampling`` says otherwise."""
    return {"do": "generate", "prompts": list(prompts), "sampling": {**GREEDY, **sampling}}


def sleeps(target: Target) -> bool:
    """Whether the engine can sleep at level 1."""
    return 1 in target.sleep_levels


def model_with(kind: str, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A plain language model of a kind with these weights, in evaluation mode."""
    model = models.build(kind, 0).eval()
    model.load_state_dict(weights, strict=False)
    return model


def same_completions(left: Sequence[Record], right: Sequence[Record]) -> bool:
    """Whether two calls gave the same completions.

    Log-probabilities need only agree as closely as with the reference: an engine with a prefix cache computes in another
    order the second time.
    """

    def rest(completions: Sequence[Record]) -> list[Record]:
        return [{name: value for name, value in completion.items() if name != "logprobs"} for completion in completions]

    pairs = zip(left, right, strict=False)
    return same(rest(left), rest(right)) and all(
        torch.allclose(one["logprobs"], other["logprobs"], rtol=0, atol=1e-4) for one, other in pairs
    )


class Rollouts(Clause):
    """What the clauses about completions share."""

    def check_greedy(self, execution: Execution, generated: int, weights: dict[str, torch.Tensor]) -> None:
        """Require the completions of operation ``generated`` to be the reference's with ``weights``."""
        build, operation = execution.program.operations[0], execution.program.operations[generated]
        model = model_with(build["kind"], weights)
        for rank in range(execution.target.world):
            prompts = operation["prompts"][rank % len(operation["prompts"])]
            seen = execution.at(rank, generated)
            self.require(
                len(seen) == len(prompts), f"rank {rank}: expected {len(prompts)} completions, got {len(seen)}"
            )
            for prompt, completion in zip(prompts, seen, strict=True):
                tokens, logprobs = decoding.greedy(model, prompt, operation["sampling"]["max_tokens"])
                self.require(
                    completion["prompt"] == prompt,
                    f"rank {rank}: expected the completion of {prompt}, got that of {completion['prompt']}",
                )
                self.require(
                    completion["tokens"] == tokens,
                    f"rank {rank}: {prompt}: expected {tokens}, got {completion['tokens']}",
                )
                worst = max(abs(a - b) for a, b in zip(completion["logprobs"].tolist(), logprobs, strict=True))
                self.require(
                    worst <= 1e-4,
                    f"rank {rank}: log-probabilities of {prompt} differ by {worst:.3g}, expected at most 1e-4",
                )
