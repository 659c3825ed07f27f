"""Where a completion ends."""

from collections.abc import Sequence

import torch
from typing_extensions import override

from lightrft.conformance import decoding, models
from lightrft.conformance.clause import CONTRACT, Execution, Operation, Program, Record, Target, is_error
from lightrft.conformance.contract.program_parts import program
from lightrft.conformance.contract.rollout_checks import Rollouts, generate, rollout
from lightrft.conformance.language_models import VOCABULARY


@CONTRACT.add
class CompletionEndings(Rollouts):
    """Besides end-of-sequence tokens, the first sampled token of stop_token_ids ends a completion, which includes it and
    reports the reason "stop". max_tokens ends it with the reason "length"."""

    id = "GEN-8"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        model = models.build(target.language_model, 1)
        prompt, likely = self._changing(model)
        first = likely.index(likely[-1]) + 1
        looks = [
            generate([[prompt]], max_tokens=6),
            generate([[prompt]], max_tokens=1),
            generate([[prompt]], max_tokens=6, stop_token_ids=[likely[-1]]),
            generate([[prompt]], max_tokens=6, stop_token_ids=[likely[-1], likely[0]]),
            generate([[prompt]], max_tokens=first, stop_token_ids=[likely[-1]]),
            generate([[prompt]], max_tokens=6, stop_token_ids=[prompt[-1]]),
            generate([[prompt]], max_tokens=6, stop_token_ids=[likely[-1]], ignore_eos=True),
        ]
        return [program(target, *rollout(target), *looks)]

    @staticmethod
    def _changing(model: torch.nn.Module) -> tuple[list[int], list[int]]:
        """A prompt and its greedy completion, which neither repeats one token nor contains the last token of the prompt."""
        for last in range(VOCABULARY):
            prompt = [2, last]
            likely, _ = decoding.greedy(model, prompt, 6)
            if likely[0] != likely[-1] and last not in likely:
                return prompt, likely
        raise AssertionError("every completion of this model repeats one token")

    @override
    def check(self, execution: Execution) -> None:
        model = models.build(execution.target.language_model, 1)
        for index, operation, seen in execution.each("generate"):
            sampling, (prompt,) = operation["sampling"], operation["prompts"][0]
            tokens, _ = decoding.greedy(model, prompt, sampling["max_tokens"])
            stops = [position for position, token in enumerate(tokens) if token in sampling.get("stop_token_ids", ())]
            expected = (tokens[: stops[0] + 1], "stop") if stops else (tokens, "length")
            for rank, (completion,) in enumerate(seen):
                ending = (completion["tokens"], completion["reason"])
                self.require(
                    ending == expected, f"rank {rank}: generate (operation {index}) expected {expected}, got {ending}"
                )


@CONTRACT.add
class ModelEndings(Rollouts):
    """A completion ends at the first end-of-sequence token that the model's generation configuration names, with the
    reason "stop", unless ignore_eos is set. Before min_tokens, neither these tokens nor stop_token_ids are sampled, or
    the engine refuses min_tokens. End-of-sequence tokens that are changed after preparing take effect at the next
    sync."""

    id = "GEN-11"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        prompt, likely = CompletionEndings._changing(models.build(target.language_model, 1))
        build, *prepared = rollout(target)
        first: Operation = {"do": "end_tokens", "model": "a", "ids": [likely[-1]]}
        then: Operation = {"do": "end_tokens", "model": "a", "ids": [likely[0]]}
        look = generate([[prompt]], max_tokens=6)
        minimum = likely.index(likely[-1]) + 2
        least = generate([[prompt]], max_tokens=6, min_tokens=minimum)
        stops = generate([[prompt]], max_tokens=6, min_tokens=minimum, stop_token_ids=[likely[-1]], ignore_eos=True)
        looks: list[Operation] = [
            look,
            generate([[prompt]], max_tokens=6, ignore_eos=True),
            {**least, "may_fail": True},
            {**stops, "may_fail": True},
        ]
        changed: list[Operation] = [
            then,
            {"do": "sync", "model": "a"},
            look,
            generate([[prompt]], max_tokens=6, ignore_eos=True),
        ]
        return [
            program(target, build, first, *prepared, *looks, *changed),
            program(target, build, *prepared, look, *changed),
        ]

    @override
    def check(self, execution: Execution) -> None:
        model = models.build(execution.target.language_model, 1)
        ends: Sequence[int] = ()
        for index, operation in enumerate(execution.program.operations):
            if operation["do"] == "end_tokens":
                ends = operation["ids"]
            if operation["do"] != "generate":
                continue
            for rank in range(execution.target.world):
                seen = execution.at(rank, index)
                if is_error(seen):
                    self.require_error(seen, "EngineError", "min_tokens", where=f"rank {rank}, min_tokens")
                    continue
                wanted = self._wanted(model, operation["prompts"][0][0], operation["sampling"], ends)
                got = (seen[0]["tokens"], seen[0]["reason"])
                self.require(
                    got == wanted,
                    f"rank {rank}: generate (operation {index}) with {operation['sampling']} and the model's end-of-sequence "
                    f"tokens {list(ends)}: expected {wanted}, got {got}",
                )

    @staticmethod
    def _wanted(
        model: torch.nn.Module, prompt: Sequence[int], sampling: Record, ends: Sequence[int]
    ) -> tuple[list[int], str]:
        """The greedy tokens, and why they end."""
        ends = [*(() if sampling.get("ignore_eos") else ends), *sampling.get("stop_token_ids", ())]
        output: list[int] = []
        while len(output) < sampling["max_tokens"] and not (output and output[-1] in ends):
            with torch.no_grad():
                scores = models.logits_of(model, torch.tensor([[*prompt, *output]]))[0, -1].float()
            if len(output) < sampling.get("min_tokens", 0):
                scores[list(ends)] = -torch.inf
            output.append(int(scores.argmax()))
        return output, "stop" if output[-1] in ends else "length"
