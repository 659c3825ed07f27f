"""Defects of engines: ends of completions, sampling, caches and memory."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy, RolloutEngine
from lightrft.strategy.engine import apply_penalties, sample_tokens
from lightrft.strategy.models import state_dict_adapter, weight_stream
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout import fake_engine
from lightrft.strategy.rollout.engine import Completion, Prompt
from lightrft.strategy.rollout.fake_engine import FakeEngine
from lightrft.strategy.rollout.sampling import Sampling, _filtered

# mypy: disable-error-code="misc"

Tokens = Sequence[Sequence[int]]


@saboteur("GEN-8")
class StopIgnored(FakeEngine):
    """stop_token_ids are ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, stop_token_ids=()), seed, sample)


@saboteur("GEN-8")
class StopIgnoredWithTheEnd(FakeEngine):
    """ignore_eos ignores stop_token_ids too."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        stops = () if sampling.ignore_eos else sampling.stop_token_ids
        return super()._complete(prompt, replace(sampling, stop_token_ids=stops), seed, sample)


@saboteur("GEN-10")
class RepetitionIgnored(FakeEngine):
    """repetition_penalty is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, repetition_penalty=1.0), seed, sample)


@saboteur("GEN-10")
class PenaltiesSwapped(FakeEngine):
    """presence_penalty and frequency_penalty are swapped."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        presence, frequency = sampling.frequency_penalty, sampling.presence_penalty
        swapped = replace(sampling, presence_penalty=presence, frequency_penalty=frequency)
        return super()._complete(prompt, swapped, seed, sample)


@saboteur("GEN-10")
class RepetitionOfTheCompletion(FakeEngine):
    """repetition_penalty does not include the tokens of the prompt."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        def without_prompt(logits: Tensor, prompts: Tokens, outputs: Tokens, sampling: Sampling) -> Tensor:
            return apply_penalties(logits, outputs, outputs, sampling) if outputs[0] else logits

        with patch.object(fake_engine, "apply_penalties", without_prompt):
            return super()._complete(prompt, sampling, seed, sample)


@saboteur("GEN-8")
class AlwaysStopped(FakeEngine):
    """finish_reason is "stop" even if max_tokens ended the completion."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return replace(super()._complete(prompt, sampling, seed, sample), finish_reason="stop")


@saboteur("GEN-8")
class StopTokenCutOff(FakeEngine):
    """The stop token is cut off the completion."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        done = super()._complete(prompt, sampling, seed, sample)
        if done.finish_reason != "stop" or done.logprobs is None:
            return done
        return replace(done, output_token_ids=done.output_token_ids[:-1], logprobs=done.logprobs[:-1])


@saboteur("GEN-9")
class TopKIgnored(FakeEngine):
    """top_k is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, top_k=-1), seed, sample)


@saboteur("GEN-9")
class TopPIgnored(FakeEngine):
    """top_p is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, top_p=1.0), seed, sample)


@saboteur("SYNC-5")
class PrefixesKept(FakeEngine):
    """Completions of long prompts are cached, and used again after a sync."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        kept: dict[tuple[object, Sampling], list[Completion]] = self.__dict__.setdefault("kept", {})
        completions = []
        for prompt in prompts:
            key = (prompt.token_ids, sampling)
            if len(prompt.token_ids or ()) < 32 or key not in kept:
                kept[key] = super()._generate([prompt], sampling)
            completions += [replace(done, weight_version=self.weight_version) for done in kept[key]]
        return completions


@saboteur("SYNC-6")
class WholeModelAtOnce(FakeStrategy):
    """A sync copies the whole model before it sends any of it."""

    def update_engine_weights(self, actor: nn.Module) -> None:
        full_parameters = weight_stream.full_parameters
        copied = patch.object(
            weight_stream,
            "full_parameters",
            lambda *arguments: iter([[(n, t.clone()) for n, t in bucket] for bucket in full_parameters(*arguments)]),
        )
        with copied:
            super().update_engine_weights(actor)


@saboteur("SYNC-1")
class SharesWeights(FakeEngine):
    """The engine shares the memory of the tensors that it is sent, which training changes."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        self._model._allocate()
        tensors = state_dict_adapter.saved_tensors(self._model.module)
        for bucket in buckets:
            for name, tensor in state_dict_adapter.restore(self._model.module, dict(bucket)).items():
                tensors[name].data = tensor


@saboteur("GEN-1")
class EqualPromptsOnce(FakeEngine):
    """Equal prompts are completed once."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return super()._generate(list(dict.fromkeys(prompts)), sampling)


@saboteur("GEN-8")
class FirstStopOnly(FakeEngine):
    """Of several stop_token_ids, only the first stops."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, stop_token_ids=sampling.stop_token_ids[:1]), seed, sample)


@saboteur("GEN-8")
class LengthWins(FakeEngine):
    """finish_reason is "length" if the last of max_tokens is a stop token."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        done = super()._complete(prompt, sampling, seed, sample)
        return replace(done, finish_reason="length") if len(done.output_token_ids) == sampling.max_tokens else done


@saboteur("GEN-8")
class StopsInThePrompt(FakeEngine):
    """The completion of a prompt that ends with a stop token has one token."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        over = (prompt.token_ids or ())[-1:] and prompt.token_ids[-1] in sampling.stop_token_ids  # type: ignore[index]
        return super()._complete(prompt, replace(sampling, max_tokens=1) if over else sampling, seed, sample)


@saboteur("GEN-9")
class TopPWidened(FakeEngine):
    """top_p is 1.3 times too large."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, top_p=min(1.0, 1.3 * sampling.top_p)), seed, sample)


@saboteur("GEN-9")
class OneFilter(FakeEngine):
    """With top_p, top_k is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, top_k=-1) if sampling.top_p < 1 else sampling, seed, sample)


@saboteur("GEN-9")
class MinPIgnored(FakeEngine):
    """min_p is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, min_p=0.0), seed, sample)


@saboteur("GEN-9")
class TemperatureLast(FakeEngine):
    """The filters are applied before temperature."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        def filters_first(logits: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> Tensor:
            kept = _filtered(logits.double().softmax(dim=-1), sampling) > 0
            return sample_tokens(logits.where(kept, -torch.inf), replace(sampling, top_p=1.0, min_p=0.0), uniforms)

        with patch.object(fake_engine, "sample_tokens", filters_first):
            return super()._complete(prompt, sampling, seed, sample)


@saboteur("GEN-11")
class EndIgnored(FakeEngine):
    """The end-of-sequence tokens of the model are ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, ignore_eos=True), seed, sample)


@saboteur("GEN-11")
class AlwaysEnds(FakeEngine):
    """ignore_eos has no effect."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, ignore_eos=False), seed, sample)


@saboteur("GEN-11")
class NoMinimum(FakeEngine):
    """min_tokens is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, min_tokens=0), seed, sample)


@saboteur("GEN-11")
class EndsOfTheSetup(FakeEngine):
    """End-of-sequence tokens that are set after the engine is built do not reach it."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        self.eos_token_ids = self.__dict__.setdefault("ends_of_the_setup", self.eos_token_ids)
        return super()._generate(prompts, sampling)


@saboteur("GEN-11")
class StopsBeforeTheMinimum(FakeEngine):
    """With stop_token_ids, min_tokens is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        least = 0 if sampling.stop_token_ids else sampling.min_tokens
        return super()._complete(prompt, replace(sampling, min_tokens=least), seed, sample)


@saboteur("GEN-2")
class ZeroIsNoSeed(FakeEngine):
    """seed=0 counts as no seed."""

    @override
    def _call_seed(self, sampling: Sampling) -> int:
        return super()._call_seed(replace(sampling, seed=sampling.seed or None))


@saboteur("GEN-9")
class TooManyToChooseFrom(FakeEngine):
    """top_k above the size of the vocabulary raises."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        vocabulary = self._model.logits(torch.tensor([[0]])).shape[-1]
        if sampling.top_k > vocabulary:
            raise RuntimeError("selected index k out of range")
        return super()._complete(prompt, sampling, seed, sample)


@saboteur("GEN-1")
class TokensAsTensors(FakeEngine):
    """The token ids of prompts are 0-d tensors."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        done = super()._complete(prompt, sampling, seed, sample)
        return replace(done, prompt_token_ids=tuple(torch.tensor(done.prompt_token_ids)))


@saboteur("GEN-1", verdict="hang")
class WaitsForPrompts(FakeEngine):
    """Without prompts, generate waits for some."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        while not prompts:
            time.sleep(0.1)
        return super().generate(prompts, sampling)


@saboteur("GEN-12", world=2)
class OneStreamForAllRanks(PlainStrategy):
    """Without a seed, the engines of all ranks draw from the same random stream."""

    def setup_inference_engine(
        self, args: object = None, engine_type: str | None = None, actor: nn.Module | None = None
    ) -> RolloutEngine | None:
        engine = super().setup_inference_engine(args, engine_type, actor)
        engine._stream = (self.config.seed, 0)  # type: ignore[union-attr]
        return engine


@saboteur("GEN-13")
class SeedsByPosition(FakeEngine):
    """seeds_by_prompt is claimed, and a draw depends on the position of the prompt in the batch."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return [
            self._complete(prompt, sampling, self._call_seed(sampling) + index, sample)
            for index, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        ]


@saboteur("GEN-13")
class StopStringsDropped(FakeEngine):
    """Stop strings are not claimed, and ignored."""

    @override
    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        super()._check(prompts, replace(sampling, stop=()))


@saboteur("ALL-1")
class LosesWeightsAsleep(FakeEngine):
    """A sleep that keeps the weights loses those of the embedding."""

    @override
    def _sleep(self, level: int) -> None:
        super()._sleep(level)
        next(self._model.module.parameters()).data.zero_()


@saboteur("LIFE-5")
class LeavesEngineThread(FakeEngine):
    """Each engine leaves a thread."""

    @override
    def _shutdown(self) -> None:
        super()._shutdown()
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
