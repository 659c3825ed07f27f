"""Which tokens are sampled: seeds, filters and penalties."""

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from typing_extensions import override

from lightrft.conformance import decoding, models
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Record, Target, show
from lightrft.conformance.contract.program_parts import program
from lightrft.conformance.contract.rollout_checks import generate, rollout, same_completions
from lightrft.conformance.language_models import VOCABULARY


@CONTRACT.add
class Repeatable(Clause):
    """Greedy generation is reproducible. Sampling with a seed is reproducible; a different seed, a different prompt or
    no seed gives new samples."""

    id = "GEN-2"
    prompts: ClassVar[Sequence[object]] = ([[1, 2, 3], [4]], [[5, 6]], [], [[5, 6], [4]])
    seeds: ClassVar[Sequence[int]] = (3, 3, 4, 3 + 2**20, 0, 0)

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        """The same calls on two models: one that distinguishes prompts, and one that gives all tokens the same probability.

        Only with the latter is it certain that independent samples differ.
        """
        hot: Record = {
            "temperature": 2.0,
            "max_tokens": 24,
            "n": 2,
            "ignore_eos": True,
        }  # the highest temperature that every engine accepts
        greedy = {"max_tokens": 24, "ignore_eos": True}
        looks = [greedy, greedy, *({**hot, "seed": seed} for seed in self.seeds), hot, hot]
        calls = [generate(self.prompts, **sampling) for sampling in looks]
        return [program(target, *rollout(target, before=before), *calls) for before in ("", models.UNIFORM)]

    @override
    def check(self, execution: Execution) -> None:
        uniform = execution.program.operations[0]["kind"].startswith(models.UNIFORM)
        calls = [seen for _, _, seen in execution.each("generate")]
        for rank in range(execution.target.world):
            seen = [completions[rank] for completions in calls]
            self._check_repeats(rank, seen)
            if uniform and seen[0]:
                self._check_differ(rank, [_tokens(completions) for completions in seen])

    def _check_repeats(self, rank: int, calls: Sequence[Sequence[Record]]) -> None:
        greedy, greedy_again, seeded, seeded_again, _, _, zero, zero_again, _, _ = calls
        for left, right, what in (
            (greedy, greedy_again, "greedy generation"),
            (seeded, seeded_again, "sampling with a seed"),
            (zero, zero_again, "sampling with seed=0"),
        ):
            self.require(same_completions(left, right), f"rank {rank}: {what} is not reproducible")

    def _check_differ(self, rank: int, calls: Sequence[list[list[int]]]) -> None:
        """Require independent samples, from a model that gives all tokens the same probability."""
        _, _, seeded, _, other, far, zero, _, free, free_again = calls
        for left, right, what in (
            (seeded, other, "two seeds"),
            (seeded, zero, "two seeds"),
            (seeded, far, "two seeds"),
            (free, free_again, "two calls without a seed"),
        ):
            self.require(left != right, f"rank {rank}: {what} gave the same samples: {left}")
        for samples, what in ((seeded, "with one seed"), (free, "without a seed")):
            for one, another in itertools.combinations(samples, 2):
                shared = sum(left == right for left, right in zip(one, another, strict=True))
                self.require(
                    shared < len(one) / 2,
                    f"rank {rank}: {what}, expected independent completions, got {one} and {another}",
                )


def _tokens(completions: Sequence[Record]) -> list[list[int]]:
    return [completion["tokens"] for completion in completions]


@CONTRACT.add
class Filters(Clause):
    """Sampling draws only from the tokens that top_k, top_p and min_p keep, given the probabilities after temperature.
    top_k=1 is greedy at any temperature; a top_k larger than the vocabulary keeps all tokens."""

    id = "GEN-9"
    many: ClassVar[int] = 64
    """Number of samples that must contain every token with a probability of at least 1/4."""

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        hot: Record = {
            "temperature": 2.0,
            "max_tokens": 10,
            "seed": 1,
        }  # the highest temperature that every engine accepts
        looks = [
            generate(**hot, top_k=1),
            generate(**hot, top_k=3, n=2),
            generate(**hot, top_k=VOCABULARY + 1),
            generate(**{**hot, "temperature": 1.0}, top_p=0.3, n=2),
            generate(**{**hot, "temperature": 1.0, "max_tokens": 2}, top_p=0.6, n=12),
            generate(**{**hot, "max_tokens": 2}, top_k=2, top_p=0.95, n=12),
            generate(**{**hot, "max_tokens": 2}, top_k=9, top_p=0.3, n=12),
            generate(**{**hot, "temperature": 1.0, "max_tokens": 2}, min_p=0.5, n=12),
        ]
        model = models.build(target.language_model, 1)
        looks += [self._widened(model, hot, name) for name in ("top_p", "min_p")]
        return [program(target, *rollout(target), *looks)]

    @staticmethod
    def _kept(scores: torch.Tensor, sampling: Record, temperature: float) -> torch.Tensor:
        """Which tokens top_p and min_p keep, of the probabilities at ``temperature``."""
        probabilities = (scores / temperature).softmax(dim=0)
        more_likely = torch.stack([probabilities[probabilities > each].sum() for each in probabilities])
        floor = sampling.get("min_p", 0.0) * probabilities.max()
        kept: torch.Tensor = (more_likely < sampling.get("top_p", 1.0)) & (probabilities >= floor)
        return kept

    def _widened(self, model: torch.nn.Module, hot: Record, name: str) -> Operation:
        """Draw once after a prompt and with a filter for which a quarter of the draws are kept only after temperature."""
        prompts = list(itertools.product(range(VOCABULARY), repeat=2))
        with torch.no_grad():
            scores = models.logits_of(model, torch.tensor(prompts))[:, -1].double()
        for value in (0.3, 0.5, 0.7, 0.9, 0.1):
            sampling: Record = {**hot, "max_tokens": 1, name: value}
            for prompt, row in zip(prompts, scores, strict=True):
                probabilities = (row / hot["temperature"]).softmax(dim=0)
                probabilities = probabilities * self._kept(row, sampling, hot["temperature"])
                if probabilities[~self._kept(row, sampling, 1.0)].sum() > probabilities.sum() / 4:
                    return generate([[list(prompt)]], **sampling, n=self.many)
        raise AssertionError(f"after every prompt of this model, temperature hardly changes what {name} keeps")

    @override
    def check(self, execution: Execution) -> None:
        model = models.build(execution.target.language_model, 1)
        for index, operation, seen in execution.each("generate"):
            for rank, completions in enumerate(seen):
                for completion in completions:
                    self._check_drawn(
                        operation["sampling"], model, completion, f"rank {rank}, generate (operation {index})"
                    )
                if operation["sampling"].get("n") == self.many:
                    self._check_widened(operation["sampling"], model, completions, f"rank {rank}")

    def _check_widened(
        self, sampling: Record, model: torch.nn.Module, completions: Sequence[Record], where: str
    ) -> None:
        """Require a token that the filters would not keep before temperature."""
        with torch.no_grad():
            scores = models.logits_of(model, torch.tensor([completions[0]["prompt"]]))[0, -1].double()
        before = self._kept(scores, sampling, 1.0)
        drawn = sorted({token for completion in completions for token in completion["tokens"]})
        self.require(
            not all(before[token] for token in drawn),
            f"{where}: {len(completions)} samples with {sampling} are all of {drawn}, which the filters keep before "
            f"temperature; expected others, which they keep after it",
        )

    def _check_drawn(self, sampling: Record, model: torch.nn.Module, completion: Record, where: str) -> None:
        """Require each token to be among those that the filters keep, within rounding."""
        prompt, tokens = completion["prompt"], completion["tokens"]
        with torch.no_grad():
            scores = models.logits_of(model, torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].double()
        for position, (token, row) in enumerate(zip(tokens, scores, strict=True)):
            more_likely = row > row[token] + 1e-3
            count = int(more_likely.sum())
            mass = float((row / sampling["temperature"]).softmax(dim=0)[more_likely].sum())
            holds = count < sampling.get("top_k", count + 1) and mass < sampling.get("top_p", 1.0) + 1e-3
            share = float(((row[token] - row.max()) / sampling["temperature"]).exp())
            holds = holds and share >= sampling.get("min_p", 0.0) - 1e-3
            self.require(
                holds,
                f"{where}: token {position} of {tokens} is {token}, but {count} tokens with probability {mass:.3f} are more "
                f"likely, and the most likely one {1 / max(share, 1e-9):.1f} times as likely; expected it to be filtered out "
                f"by {sampling}",
            )


@CONTRACT.add
class Penalties(Clause):
    """The repetition penalty divides positive logits and multiplies negative logits of tokens in the prompt or the
    completion. The presence penalty is subtracted once, and the frequency penalty once per occurrence, from the logits
    of tokens in the completion."""

    id = "GEN-10"
    settings: ClassVar[Sequence[tuple[float, float, float]]] = [
        (1.6, 0.0, 0.0), (0.6, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, -1.5, 0.0), (1.0, 0.0, 1.5), (1.0, 0.0, -0.5),
        (1.3, 0.7, 0.4),
    ]  # fmt: skip

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        model = models.build(target.language_model, 1)
        looks = [
            generate([[self._distinguishing(model, case)]], max_tokens=8, repetition_penalty=case[0], presence_penalty=case[1], frequency_penalty=case[2])
            for case in self.settings
        ]  # fmt: skip
        return [program(target, *rollout(target), *looks)]

    @staticmethod
    def _distinguishing(model: torch.nn.Module, penalties: tuple[float, float, float]) -> list[int]:
        """A prompt that other penalties would complete differently, and whose tokens do not depend on rounding."""
        repetition, presence, frequency = penalties
        others = [(1.0, presence, frequency), (repetition, 0.0, frequency), (repetition, presence, 0.0)]
        for first, second in itertools.product(range(VOCABULARY), repeat=2):
            prompt = [first, second, first]
            wanted, lead = decoding.penalised(model, prompt, 8, penalties)
            others_complete = [decoding.penalised(model, prompt, 8, case)[0] for case in others if case != penalties]
            if repetition != 1:
                others_complete.append(decoding.penalised(model, prompt, 8, penalties, forgets_prompt=True)[0])
            if lead > 1e-3 and wanted not in others_complete:
                return prompt
        raise AssertionError(f"no prompt distinguishes the penalties {penalties} from others")

    @override
    def check(self, execution: Execution) -> None:
        model = models.build(execution.target.language_model, 1)
        for index, operation, seen in execution.each("generate"):
            sampling, (prompt,) = operation["sampling"], operation["prompts"][0]
            penalties = [sampling[f"{kind}_penalty"] for kind in ("repetition", "presence", "frequency")]
            wanted, _ = decoding.penalised(model, prompt, sampling["max_tokens"], penalties)
            for rank, (completion,) in enumerate(seen):
                self.require(
                    completion["tokens"] == wanted,
                    f"rank {rank}: generate (operation {index}) with penalties {penalties}: expected {wanted}, "
                    f"got {completion['tokens']}",
                )


@CONTRACT.add
class UnseededRanksDiffer(Clause):
    """Without a seed, ranks draw different samples for the same prompt, so the samples of a prompt may be spread over
    ranks."""

    id = "GEN-12"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        free = generate([[[1, 2, 3]]], temperature=2.0, max_tokens=24, n=2, ignore_eos=True)
        return [program(target, *rollout(target, before=models.UNIFORM), free, free)]

    @override
    def check(self, execution: Execution) -> None:
        drawn = [
            (f"generate (operation {index}) on rank {rank}", _tokens(completions))
            for index, _, seen in execution.each("generate")
            for rank, completions in enumerate(seen)
        ]
        for (one, samples), (other, same) in itertools.combinations(drawn, 2):
            self.require(samples != same, f"without a seed, {one} and {other} drew the same samples: {show(samples)}")


@CONTRACT.add
class ClaimedCapabilities(Clause):
    """An engine does what its capabilities claim, and refuses the rest: with a seed and seeds_by_prompt, a completion
    depends only on the seed, its prompt and its sample number, not on the other prompts, their order or the rank."""

    id = "GEN-13"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        seeded: Record = {"temperature": 2.0, "max_tokens": 12, "n": 2, "seed": 3}
        batches: list[list[list[list[int]]]] = [
            [[[1, 2, 3], [4]], [[5, 6], [4], [1, 2, 3]]], [[[4], [1, 2, 3]]], [[[1, 2, 3]]], [[[7], [8, 9], [4]]],
        ]  # fmt: skip
        image = {"all_prompts": ["<|vision_start|><|image_pad|><|vision_end|>"], "all_images": [["an image"]]}
        refused: list[Operation] = [
            {
                "do": "generate_local",
                "sampling": {"max_tokens": 1, "stop": ["x"]},
                "token_ids": [[1]],
                "may_fail": True,
            },
            {"do": "generate_raw", "sampling_params": {"max_tokens": 1}, **image, "may_fail": True},
            *({"do": "sleep", "level": level, "may_fail": True} for level in {1, 2, 3} - target.sleep_levels),
        ]
        return [
            program(
                target,
                *rollout(target),
                {"do": "claims"},
                *(generate(prompts, **seeded) for prompts in batches),
                *refused,
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        claims = execution.last("claims")
        drawn: dict[tuple[int, ...], list[list[int]]] = {}
        for rank, claimed in enumerate(claims):
            for index, _, seen in execution.each("generate") if claimed["seeds_by_prompt"] else ():
                completions = seen[rank]
                for prompt in {tuple(completion["prompt"]) for completion in completions}:
                    tokens = [each["tokens"] for each in completions if tuple(each["prompt"]) == prompt]
                    self.require(
                        drawn.setdefault(prompt, tokens) == tokens,
                        f"rank {rank}: with seeds_by_prompt and the same seed, generate (operation {index}) gave {tokens} "
                        f"after {list(prompt)}, and {drawn[prompt]} in another batch or on another rank",
                    )
            if not claimed["stop_strings"]:
                where = f"rank {rank}, stop strings that the engine does not claim to take"
                self.require_error(execution.last("generate_local")[rank], "EngineError", "stop", where=where)
            if not claimed["multimodal"]:
                where = f"rank {rank}, an image that the engine does not claim to take"
                self.require_error(execution.last("generate_raw")[rank], "EngineError", "image", where=where)
            for _, operation, seen in execution.each("sleep"):
                where = f"rank {rank}, sleep(level={operation['level']}), which the engine does not claim"
                self.require_error(seen[rank], "LightRFTError", "level", where=where)
