"""GEN: completions of prompts."""

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models, reference
from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Record, Target, is_error, show
from lightrft.conformance.contract.program_parts import program
from lightrft.conformance.contract.rollout_checks import GREEDY, PROMPTS, Rollouts, alike, generate, rollout


@CONTRACT.add
class OwnCompletions(Rollouts):
    """Each rank gets the completions of its own prompts, in order. Ranks may have different numbers of prompts,
    including none. With n samples per prompt, the n completions of a prompt are adjacent. Token ids are Python integers."""

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
        prompt = st.lists(st.integers(0, models.VOCABULARY - 1), min_size=1, max_size=5)
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
                tokens, _ = reference.greedy(model, prompt, GREEDY["max_tokens"])  # type: ignore[arg-type]
                self.require(
                    completion["tokens"] == tokens,
                    f"rank {rank}: {prompt}: expected {tokens}, got {completion['tokens']}",
                )


@CONTRACT.add
class Repeatable(Clause):
    """Greedy generation is reproducible. Sampling with a seed is reproducible; a different seed, a different prompt or
    no seed gives new samples."""

    id = "GEN-2"
    prompts: ClassVar[Sequence[object]] = ([[1, 2, 3], [4]], [[5, 6]], [], [[5, 6], [4]])
    """The models are unsure after the first prompt of each rank; after others, two samples may well be equal."""

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        hot: Record = {
            "temperature": 2.0,
            "max_tokens": 12,
            "n": 2,
        }  # the highest temperature that every engine accepts
        seeds = [3, 3, 4, 3 + 2**20, 0, 0]
        looks = [{}, {}, *({**hot, "seed": seed} for seed in seeds), hot, hot]
        distinguishing = (*rollout(target), *(generate(self.prompts, **sampling) for sampling in looks))
        sampling = {"temperature": 1.0, "max_tokens": 12, "n": 2, "seed": 3, "ignore_eos": True}
        indifferent = (*rollout(target, before=models.INDIFFERENT), generate(self.prompts, **sampling))
        return [program(target, *operations) for operations in (distinguishing, indifferent)]

    @override
    def check(self, execution: Execution) -> None:
        if len(list(execution.each("generate"))) == 1:
            self._check_apart(execution)
        else:
            self._check_repeats(execution)

    def _check_apart(self, execution: Execution) -> None:
        """Require completions to be independent of each other if the model ignores the prompt and the seed is the same."""
        for rank, seen in enumerate(execution.last("generate")):
            for one, other in itertools.combinations(_tokens(seen), 2):
                shared = sum(left == right for left, right in zip(one, other, strict=True))
                self.require(
                    shared < len(one) / 2,
                    f"rank {rank}: with one seed, expected independent completions, got {one} and {other}",
                )

    def _check_repeats(self, execution: Execution) -> None:
        greedy, greedy_again, seeded, seeded_again, other, far, zero, zero_again, free, free_again = [
            seen for _, _, seen in execution.each("generate")
        ]
        for rank in range(execution.target.world):
            if not greedy[rank]:
                continue
            self.require(alike(greedy[rank], greedy_again[rank]), f"rank {rank}: greedy generation is not reproducible")
            self.require(
                alike(seeded[rank], seeded_again[rank]), f"rank {rank}: sampling with a seed is not reproducible"
            )
            self.require(alike(zero[rank], zero_again[rank]), f"rank {rank}: sampling with seed=0 is not reproducible")
            pairs = [
                (seeded, other, "two seeds"),
                (seeded, zero, "two seeds"),
                (seeded, far, "two seeds"),
                (free, free_again, "two calls without a seed"),
            ]
            for left, right, what in pairs:
                differ = _tokens(left[rank]) != _tokens(right[rank])
                self.require(differ, f"rank {rank}: {what} gave the same samples: {_tokens(left[rank])}")
            for samples in map(_tokens, (seeded[rank], free[rank])):
                apart = samples[0] != samples[1]
                self.require(apart, f"rank {rank}: the samples of one prompt are the same: {samples[0]}")


def _tokens(completions: Sequence[Record]) -> list[list[int]]:
    return [completion["tokens"] for completion in completions]


@CONTRACT.add
class EitherOr(Clause):
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
class Agreement(Clause):
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
                    reference.score(model, observed["prompt"], observed["tokens"]), dtype=torch.float64
                )
                worst = (observed["logprobs"] - wanted).abs().max().item()
                self.require(
                    worst <= 1e-4,
                    f"rank {rank}: log-probabilities differ by {worst:.3g} from the training model's, expected at most 1e-4",
                )


@CONTRACT.add
class Endings(Rollouts):
    """A completion ends with the first sampled token of stop_token_ids, which it includes, and reports the reason
    "stop"; or it ends after max_tokens and reports the reason "length"."""

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
        for last in range(models.VOCABULARY):
            prompt = [2, last]
            likely, _ = reference.greedy(model, prompt, 6)
            if likely[0] != likely[-1] and last not in likely:
                return prompt, likely
        raise AssertionError("every completion of this model repeats one token")

    @override
    def check(self, execution: Execution) -> None:
        model = models.build(execution.target.language_model, 1)
        for index, operation, seen in execution.each("generate"):
            sampling, (prompt,) = operation["sampling"], operation["prompts"][0]
            tokens, _ = reference.greedy(model, prompt, sampling["max_tokens"])
            stops = [position for position, token in enumerate(tokens) if token in sampling.get("stop_token_ids", ())]
            expected = (tokens[: stops[0] + 1], "stop") if stops else (tokens, "length")
            for rank, (completion,) in enumerate(seen):
                ending = (completion["tokens"], completion["reason"])
                self.require(
                    ending == expected, f"rank {rank}: generate (operation {index}) expected {expected}, got {ending}"
                )


@CONTRACT.add
class Filters(Clause):
    """Sampling draws only from the tokens that top_k, top_p and min_p keep, of the probabilities after temperature. top_k=1
    is greedy at any temperature, and one above the size of the vocabulary keeps all."""

    id = "GEN-9"
    many: ClassVar[int] = 64
    """Samples among which any token that a quarter of the draws give must be."""

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
            generate(**hot, top_k=models.VOCABULARY + 1),
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
        prompts = list(itertools.product(range(models.VOCABULARY), repeat=2))
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
        for first, second in itertools.product(range(models.VOCABULARY), repeat=2):
            prompt = [first, second, first]
            wanted, lead = reference.penalised(model, prompt, 8, penalties)
            others_complete = [reference.penalised(model, prompt, 8, case)[0] for case in others if case != penalties]
            if repetition != 1:
                others_complete.append(reference.penalised(model, prompt, 8, penalties, forgets_prompt=True)[0])
            if lead > 1e-3 and wanted not in others_complete:
                return prompt
        raise AssertionError(f"no prompt distinguishes the penalties {penalties} from others")

    @override
    def check(self, execution: Execution) -> None:
        model = models.build(execution.target.language_model, 1)
        for index, operation, seen in execution.each("generate"):
            sampling, (prompt,) = operation["sampling"], operation["prompts"][0]
            penalties = [sampling[f"{kind}_penalty"] for kind in ("repetition", "presence", "frequency")]
            wanted, _ = reference.penalised(model, prompt, sampling["max_tokens"], penalties)
            for rank, (completion,) in enumerate(seen):
                self.require(
                    completion["tokens"] == wanted,
                    f"rank {rank}: generate (operation {index}) with penalties {penalties}: expected {wanted}, "
                    f"got {completion['tokens']}",
                )


@CONTRACT.add
class ModelEndings(Rollouts):
    """A completion ends with the first end-of-sequence token that the model's generation configuration names, with the
    reason "stop"; not with ignore_eos. Before min_tokens none is drawn, nor one of stop_token_ids, or the engine
    refuses min_tokens. Tokens that are set after preparing count from the next sync on."""

    id = "GEN-11"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        prompt, likely = Endings._changing(models.build(target.language_model, 1))
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


@CONTRACT.add
class RanksDiffer(Clause):
    """Without a seed, ranks draw different samples for the same prompt: the samples of a prompt may be spread over
    ranks."""

    id = "GEN-12"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        free = generate([[[1, 2, 3]]], temperature=2.0, max_tokens=12, n=16)
        return [program(target, *rollout(target), free, free)]

    @override
    def check(self, execution: Execution) -> None:
        drawn = [
            (f"generate (operation {index}) on rank {rank}", _tokens(completions))
            for index, _, seen in execution.each("generate")
            for rank, completions in enumerate(seen)
        ]
        for (one, samples), (other, same) in itertools.combinations(drawn, 2):
            self.require(
                samples != same, f"without a seed, {one} and {other} drew the same 16 samples: {show(samples)}"
            )


@CONTRACT.add
class Claims(Clause):
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
