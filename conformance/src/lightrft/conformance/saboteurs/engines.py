"""Defects of engines: ends of completions, sampling, caches and memory."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.strategy import FakeStrategy
from lightrft.strategy.models import state_dict_adapter, weight_stream
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout import fake_engine
from lightrft.strategy.rollout.engine import Completion, Prompt
from lightrft.strategy.rollout.fake_engine import FakeEngine
from lightrft.strategy.rollout.sampling import Sampling

# mypy: disable-error-code="misc"


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
        penalized: Any = vars(fake_engine)["penalized"]

        def without_prompt(logits: Any, prompts: Any, outputs: Any, sampling: Sampling) -> Any:
            return penalized(logits, outputs, outputs, sampling) if outputs[0] else logits

        with patch.object(fake_engine, "penalized", without_prompt):
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
        kept: dict[Any, list[Completion]] = self.__dict__.setdefault("kept", {})
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

    def update_engine_weights(self, actor: Any) -> None:
        full_parameters = weight_stream.full_parameters

        def copied(*arguments: Any) -> Iterator[Bucket]:
            yield from [[(name, tensor.clone()) for name, tensor in bucket] for bucket in full_parameters(*arguments)]

        with patch.object(weight_stream, "full_parameters", copied):
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
