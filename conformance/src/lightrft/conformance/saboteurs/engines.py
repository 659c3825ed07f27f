"""Engines that end, draw, remember and take memory as they should not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.strategy import FakeStrategy
from lightrft.strategy.rollout import fake_engine, saved_form
from lightrft.strategy.rollout.engine import Completion, Prompt
from lightrft.strategy.rollout.fake_engine import FakeEngine
from lightrft.strategy.rollout.sampling import Sampling
from lightrft.strategy.rollout.weights import Bucket

# mypy: disable-error-code="misc"


@saboteur("GEN-8", engine=True)
class StopIgnored(FakeEngine):
    """stop_token_ids are ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, stop_token_ids=()), seed, sample)


@saboteur("GEN-8", engine=True)
class StopIgnoredWithTheEnd(FakeEngine):
    """Where the end-of-sequence token is ignored, so are stop_token_ids."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        stops = () if sampling.ignore_eos else sampling.stop_token_ids
        return super()._complete(prompt, replace(sampling, stop_token_ids=stops), seed, sample)


@saboteur("GEN-10", engine=True)
class RepetitionIgnored(FakeEngine):
    """repetition_penalty is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, repetition_penalty=1.0), seed, sample)


@saboteur("GEN-10", engine=True)
class PenaltiesSwapped(FakeEngine):
    """The presence penalty is taken as often as a token came, the frequency penalty once."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        presence, frequency = sampling.frequency_penalty, sampling.presence_penalty
        swapped = replace(sampling, presence_penalty=presence, frequency_penalty=frequency)
        return super()._complete(prompt, swapped, seed, sample)


@saboteur("GEN-10", engine=True)
class RepetitionOfTheCompletion(FakeEngine):
    """The repetition penalty knows nothing of the prompt."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        names = vars(fake_engine)
        original = names["penalized"]
        names["penalized"] = lambda logits, prompts, outputs, given: original(logits, [[]], outputs, given)
        try:
            return super()._complete(prompt, sampling, seed, sample)
        finally:
            names["penalized"] = original


@saboteur("GEN-8", engine=True)
class AlwaysStopped(FakeEngine):
    """The reason is "stop" also where max_tokens ended it."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return replace(super()._complete(prompt, sampling, seed, sample), finish_reason="stop")


@saboteur("GEN-8", engine=True)
class StopTokenCutOff(FakeEngine):
    """The stop token is not part of the completion."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        done = super()._complete(prompt, sampling, seed, sample)
        if done.finish_reason != "stop" or done.logprobs is None:
            return done
        return replace(done, output_token_ids=done.output_token_ids[:-1], logprobs=done.logprobs[:-1])


@saboteur("GEN-9", engine=True)
class TopKIgnored(FakeEngine):
    """top_k is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, top_k=-1), seed, sample)


@saboteur("GEN-9", engine=True)
class TopPIgnored(FakeEngine):
    """top_p is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, top_p=1.0), seed, sample)


@saboteur("SYNC-5", engine=True)
class PrefixesKept(FakeEngine):
    """What was computed for a long prompt is kept, and used again after a sync."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        kept: dict[Any, list[Completion]] = self.__dict__.setdefault("kept", {})
        found = []
        for prompt in prompts:
            key = (prompt.token_ids, sampling)
            if len(prompt.token_ids or ()) < 32 or key not in kept:
                kept[key] = super()._generate([prompt], sampling)
            found += [replace(it, weight_version=self.weight_version) for it in kept[key]]
        return found


@saboteur("SYNC-6")
class WholeModelAtOnce(FakeStrategy):
    """A sync begins with a copy of the whole model."""

    def full_parameters(
        self, model: nn.Module, bucket_bytes: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        everything = [
            [(name, tensor.clone()) for name, tensor in bucket]
            for bucket in super().full_parameters(model, bucket_bytes, dtype)
        ]
        yield from everything


@saboteur("SYNC-1", engine=True)
class SharesWeights(FakeEngine):
    """The engine keeps the tensors that it is sent, which go on training."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        self._model._allocate()
        own = saved_form.saved_tensors(self._model.module)
        for bucket in buckets:
            for name, tensor in saved_form.restore(self._model.module, dict(bucket)).items():
                own[name].data = tensor


@saboteur("GEN-1", engine=True)
class EqualPromptsOnce(FakeEngine):
    """Prompts that are equal are completed once."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return super()._generate(list(dict.fromkeys(prompts)), sampling)


@saboteur("GEN-8", engine=True)
class FirstStopOnly(FakeEngine):
    """Of several stop_token_ids only the first stops."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, stop_token_ids=sampling.stop_token_ids[:1]), seed, sample)


@saboteur("GEN-8", engine=True)
class LengthWins(FakeEngine):
    """A stop token that is drawn as the last of max_tokens is no reason."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        done = super()._complete(prompt, sampling, seed, sample)
        return replace(done, finish_reason="length") if len(done.output_token_ids) == sampling.max_tokens else done


@saboteur("GEN-8", engine=True)
class StopsInThePrompt(FakeEngine):
    """A prompt that ends with a stop token gets one more token."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        over = (prompt.token_ids or ())[-1:] and prompt.token_ids[-1] in sampling.stop_token_ids  # type: ignore[index]
        return super()._complete(prompt, replace(sampling, max_tokens=1) if over else sampling, seed, sample)


@saboteur("GEN-9", engine=True)
class TopPWidened(FakeEngine):
    """top_p leaves a third more than it says."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, top_p=min(1.0, 1.3 * sampling.top_p)), seed, sample)


@saboteur("GEN-9", engine=True)
class OneFilter(FakeEngine):
    """With top_p, top_k is ignored."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        return super()._complete(prompt, replace(sampling, top_k=-1) if sampling.top_p < 1 else sampling, seed, sample)
