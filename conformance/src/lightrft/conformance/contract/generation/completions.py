"""Which completions each rank gets, and their log-probabilities."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import decoding, models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error, show
from lightrft.conformance.contract.program_parts import program
from lightrft.conformance.contract.rollout_checks import GREEDY, PROMPTS, Rollouts, generate, rollout
from lightrft.conformance.language_models import VOCABULARY


@CONTRACT.add
class CompletionsOfEachRank(Rollouts):
    """Each rank gets the completions of its own prompts, in order. Ranks may have different numbers of prompts,
    including none. With n samples per prompt, the n completions of a prompt are adjacent. Token ids are Python
    integers."""

    id = "GEN-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        equal = [[[1, 2, 3], [4], [1, 2, 3]], [[5, 6], [5, 6]], []]
        none_first: Sequence[object] = [[], [[5, 6]]]
        cases = [(PROMPTS, 1), (PROMPTS, 3), (equal, 1), (equal, 2), (none_first, 1)]
        return [self._program(target, prompts, n) for prompts, n in cases]

    def _program(self, target: Target, prompts: Sequence[object], samples: int) -> Program:
        return program(target, *rollout(target), {**generate(prompts, n=samples)})

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        prompt = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5)
        counts = st.lists(st.lists(prompt, max_size=4), min_size=target.world, max_size=target.world)
        return st.builds(lambda prompts, n: self._program(target, prompts, n), counts, st.integers(1, 3))

    @override
    def check(self, execution: Execution) -> None:
        operation = execution.program.operations[-1]
        model, samples = models.build(execution.target.language_model, 1), operation["sampling"]["n"]
        for rank, seen in enumerate(execution.last("generate")):
            prompts = [
                prompt for prompt in operation["prompts"][rank % len(operation["prompts"])] for _ in range(samples)
            ]
            self.require(
                [observed["prompt"] for observed in seen] == prompts,
                f"rank {rank}: expected the completions of {prompts}, got those of {[observed['prompt'] for observed in seen]}",
            )
            for prompt, completion in zip(prompts, seen, strict=True):
                self.require(
                    completion["types"] == ["int"],
                    f"rank {rank}: expected token ids that are int, got {' and '.join(completion['types'])}",
                )
                tokens, _ = decoding.greedy(model, prompt, GREEDY["max_tokens"])  # type: ignore[arg-type]
                self.require(
                    completion["tokens"] == tokens,
                    f"rank {rank}: {prompt}: expected {tokens}, got {completion['tokens']}",
                )


@CONTRACT.add
class OneKindOfPrompt(Clause):
    """engine_generate_local takes either token ids or multimodal inputs. Passing neither or both raises ValueError."""

    id = "GEN-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        call: Operation = {"do": "generate_local", "sampling": GREEDY, "may_fail": True}
        both = {**call, "token_ids": [[1]], "inputs": [{"prompt": "x"}]}
        return [
            program(
                target, *rollout(target), call, both, {**call, "token_ids": [[1, 2]]}, {**call, "token_ids": [3, 4]}
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        neither, both, right, flat = [seen for _, _, seen in execution.each("generate_local")]
        for rank in range(execution.target.world):
            self.require_error(neither[rank], "ValueError", "prompt_token_ids", where=f"rank {rank}, neither")
            self.require_error(both[rank], "ValueError", "prompt_token_ids", where=f"rank {rank}, both")
            self.require(
                not is_error(right[rank]) and right[rank][0]["prompt"] == [1, 2],
                f"rank {rank}: expected a completion of [1, 2], got {show(right[rank])}",
            )
            self.require(
                not is_error(flat[rank]) and flat[rank][0]["prompt"] == [3, 4],
                f"rank {rank}: expected a completion of [3, 4], got {show(flat[rank])}",
            )


@CONTRACT.add
class LogProbsMatchModel(Clause):
    """Completions carry log-probabilities, which agree with those of the training model within the tolerance of the
    dtype."""

    id = "GEN-6"
    level = "SHOULD"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [program(target, *rollout(target), generate(temperature=1.2, top_p=0.9, seed=5, max_tokens=8))]

    @override
    def check(self, execution: Execution) -> None:
        model = models.build(execution.target.language_model, 1)
        for rank, seen in enumerate(execution.last("generate")):
            for observed in seen:
                self.require(observed["logprobs"] is not None, f"rank {rank}: expected log-probabilities, got None")
                wanted = torch.tensor(
                    decoding.score(model, observed["prompt"], observed["tokens"]), dtype=torch.float64
                )
                worst = (observed["logprobs"] - wanted).abs().max().item()
                self.require(
                    worst <= 1e-4,
                    f"rank {rank}: log-probabilities differ by {worst:.3g} from the training model's, expected at most 1e-4",
                )
