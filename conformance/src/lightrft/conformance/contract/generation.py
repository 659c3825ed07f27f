"""GEN: prompts in, completions out."""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance import models, reference
from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, show
from lightrft.conformance.contract.drawing import FP32, geometry
from lightrft.conformance.contract.rollouts import GREEDY, PROMPTS, Rollouts, alike, generate, rollout


@CONTRACT.add
class OwnCompletions(Rollouts):
    """Each rank gets its own prompts' completions, in order, whatever the ranks' counts are (0 too); with n samples per
    prompt, n in a row per prompt."""

    id = "GEN-1"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        equal = [[[1, 2, 3], [4], [1, 2, 3]], [[5, 6], [5, 6]], []]
        return [self._program(place, prompts, n) for prompts, n in [(PROMPTS, 1), (PROMPTS, 3), (equal, 1), (equal, 2)]]

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
    """Greedy generation repeats; a seed makes sampling repeat, and another seed, another prompt, or no seed, draws anew."""

    id = "GEN-2"
    prompts: ClassVar[Sequence[Any]] = ([[1, 2, 3], [4]], [[5, 6]], [], [[5, 6], [4]])
    """The first of each rank leaves the models in doubt: elsewhere they are so sure that two draws may well be alike."""

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        hot: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12, "n": 2}  # no engine has to take more
        looks = [{}, {}, {**hot, "seed": 3}, {**hot, "seed": 3}, {**hot, "seed": 4}, hot, hot]
        told_apart = (*rollout(place), *(generate(self.prompts, **sampling) for sampling in looks))
        sampling = {"temperature": 1.0, "max_tokens": 12, "n": 2, "seed": 3, "ignore_eos": True}
        not_told_apart = (*rollout(place, before=models.INDIFFERENT), generate(self.prompts, **sampling))
        settings = {**FP32, **geometry(place)}
        return [Program(operations=it, settings=settings) for it in (told_apart, not_told_apart)]

    @override
    def check(self, trial: Trial) -> None:
        if len(list(trial.each("generate"))) == 1:
            self._check_apart(trial)
        else:
            self._check_repeats(trial)

    def _check_apart(self, trial: Trial) -> None:
        """Prompts between which the model makes no difference have nothing in common but the seed."""
        for rank, seen in enumerate(trial.last("generate")):
            for one, other in itertools.combinations(_tokens(seen), 2):
                shared = sum(left == right for left, right in zip(one, other, strict=True))
                self.require(
                    shared < len(one) / 2,
                    f"rank {rank}: with one seed, completions follow each other: {one} and {other}",
                )

    def _check_repeats(self, trial: Trial) -> None:
        greedy, greedy_again, seeded, seeded_again, other, free, free_again = [
            seen for _, _, seen in trial.each("generate")
        ]
        for rank in range(trial.place.world):
            if not greedy[rank]:
                continue
            self.require(alike(greedy[rank], greedy_again[rank]), f"rank {rank}: greedy generation does not repeat")
            self.require(alike(seeded[rank], seeded_again[rank]), f"rank {rank}: sampling with a seed does not repeat")
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


@CONTRACT.add
class Endings(Rollouts):
    """A completion ends with the first of the stop_token_ids that is drawn, which it includes, for the reason "stop", or
    after max_tokens, for the reason "length"."""

    id = "GEN-8"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        model = models.build(place.language_model, 1)
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
        return [Program(operations=(*rollout(place), *looks), settings={**FP32, **geometry(place)})]

    @staticmethod
    def _changing(model: torch.nn.Module) -> tuple[list[int], list[int]]:
        """A prompt and what follows it greedily: neither one token over and over, nor the prompt's last."""
        for last in range(models.VOCABULARY):
            prompt = [2, last]
            likely, _ = reference.greedy(model, prompt, 6)
            if likely[0] != likely[-1] and last not in likely:
                return prompt, likely
        raise AssertionError("this model says one thing only")

    @override
    def check(self, trial: Trial) -> None:
        model = models.build(trial.place.language_model, 1)
        for index, operation, seen in trial.each("generate"):
            sampling, (prompt,) = operation["sampling"], operation["prompts"][0]
            tokens, _ = reference.greedy(model, prompt, sampling["max_tokens"])
            stops = [place for place, token in enumerate(tokens) if token in sampling.get("stop_token_ids", ())]
            wanted = (tokens[: stops[0] + 1], "stop") if stops else (tokens, "length")
            for rank, (completion,) in enumerate(seen):
                found = (completion["tokens"], completion["reason"])
                self.require(
                    found == wanted, f"rank {rank}: generate (operation {index}) gave {found}, wanted {wanted}"
                )


@CONTRACT.add
class Filters(Clause):
    """Sampling draws from what top_k and top_p leave, and from nothing else: top_k=1 is greedy at any temperature."""

    id = "GEN-9"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        hot: dict[str, Any] = {"temperature": 2.0, "max_tokens": 10, "seed": 1}  # no engine has to take more
        looks = [
            generate(**hot, top_k=1),
            generate(**hot, top_k=3, n=2),
            generate(**{**hot, "temperature": 1.0}, top_p=0.3, n=2),
            generate(**{**hot, "temperature": 1.0, "max_tokens": 2}, top_p=0.6, n=12),
            generate(**{**hot, "max_tokens": 2}, top_k=2, top_p=0.95, n=12),
        ]
        return [Program(operations=(*rollout(place), *looks), settings={**FP32, **geometry(place)})]

    @override
    def check(self, trial: Trial) -> None:
        model = models.build(trial.place.language_model, 1)
        for index, operation, seen in trial.each("generate"):
            for rank, completions in enumerate(seen):
                for it in completions:
                    self._check_drawn(operation["sampling"], model, it, f"rank {rank}, generate (operation {index})")

    def _check_drawn(self, sampling: dict[str, Any], model: torch.nn.Module, completion: Any, where: str) -> None:
        """Each token must be among those that the filter leaves, rounding aside."""
        prompt, tokens = completion["prompt"], completion["tokens"]
        with torch.no_grad():
            scores = models.logits_of(model, torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].double()
        for place, (token, row) in enumerate(zip(tokens, scores, strict=True)):
            more_likely = row > row[token] + 1e-3
            count = int(more_likely.sum())
            mass = float((row / sampling["temperature"]).softmax(dim=0)[more_likely].sum())
            holds = count < sampling.get("top_k", count + 1) and mass < sampling.get("top_p", 1.0) + 1e-3
            self.require(
                holds,
                f"{where}: token {place} of {tokens} is {token}, but {count} tokens, with {mass:.3f} of the probability, are "
                f"likelier ({sampling})",
            )


@CONTRACT.add
class Penalties(Clause):
    """The repetition penalty divides the logits above zero, and multiplies those below, of what prompt or completion have;
    the presence penalty is taken from the logits of what the completion has, the frequency penalty as often as it has it."""

    id = "GEN-10"
    settings: ClassVar[Sequence[tuple[float, float, float]]] = [
        (1.6, 0.0, 0.0), (0.6, 0.0, 0.0), (1.0, 1.5, 0.0), (1.0, -1.5, 0.0), (1.0, 0.0, 1.5), (1.3, 0.7, 0.4),
    ]  # fmt: skip

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        model = models.build(place.language_model, 1)
        looks = [
            generate([[self._telling(model, it)]], max_tokens=8, repetition_penalty=it[0], presence_penalty=it[1], frequency_penalty=it[2])
            for it in self.settings
        ]  # fmt: skip
        return [Program(operations=(*rollout(place), *looks), settings={**FP32, **geometry(place)})]

    @staticmethod
    def _telling(model: torch.nn.Module, penalties: tuple[float, float, float]) -> list[int]:
        """A prompt that another kind of penalty would complete otherwise, and whose tokens are no matter of rounding."""
        repetition, presence, frequency = penalties
        others = [(1.0, presence, frequency), (repetition, 0.0, frequency), (repetition, presence, 0.0)]
        for first, second in itertools.product(range(models.VOCABULARY), repeat=2):
            prompt = [first, second, first]
            wanted, lead = reference.penalised(model, prompt, 8, penalties)
            otherwise = [reference.penalised(model, prompt, 8, it)[0] for it in others if it != penalties]
            if repetition != 1:
                otherwise.append(reference.penalised(model, prompt, 8, penalties, forgets_prompt=True)[0])
            if lead > 1e-3 and wanted not in otherwise:
                return prompt
        raise AssertionError(f"no prompt tells penalties of {penalties} from others")

    @override
    def check(self, trial: Trial) -> None:
        model = models.build(trial.place.language_model, 1)
        for index, operation, seen in trial.each("generate"):
            sampling, (prompt,) = operation["sampling"], operation["prompts"][0]
            penalties = [sampling[f"{kind}_penalty"] for kind in ("repetition", "presence", "frequency")]
            wanted, _ = reference.penalised(model, prompt, sampling["max_tokens"], penalties)
            for rank, (completion,) in enumerate(seen):
                self.require(
                    completion["tokens"] == wanted,
                    f"rank {rank}: generate (operation {index}) with penalties {penalties} gave {completion['tokens']}, "
                    f"wanted {wanted}",
                )
