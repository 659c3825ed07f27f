"""Defects of rollouts, of strategies and of engines."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import Completion, EngineStatus, FakeStrategy, Prompt, Sampling
from lightrft.strategy.rollout import fake_engine
from lightrft.strategy.rollout.fake_engine import FakeEngine
from lightrft.strategy.rollout.weights import Bucket

# mypy: disable-error-code="misc"


@saboteur("ENG-1")
class AlwaysAwake(FakeStrategy):
    """The engine is said to be awake as long as there is one."""

    @property
    def inference_engine_status(self) -> EngineStatus:
        return EngineStatus.ABSENT if self.inference_engine is None else EngineStatus.AWAKE


@saboteur("ENG-1")
class SleepsAfterErrors(FakeStrategy):
    """After an exception the engine is put to sleep whether it may sleep or not."""

    def gather_and_generate(self, *arguments: Any, **more: Any) -> Any:
        try:
            return super().gather_and_generate(*arguments, **more)
        except Exception:
            if self.inference_engine is not None:
                self.inference_engine.sleep()
            raise


@saboteur("ENG-1")
class SleepsUnasked(FakeStrategy):
    """The engine sleeps with enable_engine_sleep=False too."""

    def maybe_sleep_inference_engine(self) -> None:
        if self.inference_engine is not None:
            self.inference_engine.sleep()


@saboteur("ENG-2")
class TakesAnother(FakeStrategy):
    """For an unknown engine the fake one is taken."""

    def setup_inference_engine(self, args: Any = None, engine_type: Any = None, actor: Any = None) -> Any:
        try:
            return super().setup_inference_engine(args, engine_type, actor)
        except Exception:  # noqa: BLE001
            return super().setup_inference_engine(args, "fake", actor)


@saboteur("ENG-3")
class GeneratesNothing(FakeStrategy):
    """Without an engine generating gives an empty list: LightRFT's FakeStrategy."""

    def gather_and_generate(self, *arguments: Any, **more: Any) -> Any:
        return [] if self.inference_engine is None else super().gather_and_generate(*arguments, **more)


@saboteur("ENG-3")
class SyncsInSilence(FakeStrategy):
    """Without an engine syncing says nothing."""

    def update_engine_weights(self, actor: Any) -> None:
        if self.inference_engine is not None:
            super().update_engine_weights(actor)


@saboteur("SYNC-1")
class SyncsOnce(FakeStrategy):
    """Only the first sync sends anything."""

    _synced = False

    def update_engine_weights(self, actor: Any) -> None:
        if not self._synced:
            super().update_engine_weights(actor)
        self._synced = self.inference_engine is not None


@saboteur("SYNC-1")
class SendsBiasesLate(FakeStrategy):
    """Biases are a sync behind."""

    _last: dict[str, Any] = {}

    def full_parameters(self, model: Any, bucket_bytes: Any = None, dtype: Any = None) -> Any:
        for bucket in super().full_parameters(model, bucket_bytes, dtype):
            if dtype is not None:  # not for the weight sync
                yield bucket
                continue
            old = [(name, self._last.get(name, tensor) if name.endswith("bias") else tensor) for name, tensor in bucket]
            self._last = {**self._last, **{name: tensor.clone() for name, tensor in bucket}}
            yield old


@saboteur("SYNC-3")
class AlwaysTheFirst(FakeStrategy):
    """The first actor is sent, whichever is passed: LightRFT's."""

    _first: Any = None

    def update_engine_weights(self, actor: Any) -> None:
        self._first = self._first or actor
        super().update_engine_weights(self._first)


@saboteur("SYNC-2")
class SendsAnything(FakeStrategy):
    """What the engine does not know is sent all the same, and what comes of it is not looked at."""

    def update_engine_weights(self, actor: Any) -> None:
        try:
            super().update_engine_weights(actor)
        except RuntimeError:
            return


@saboteur("SYNC-9", world=2)
class CommitsAlone(PlainStrategy):
    """Where a sync fails on one rank, the engines of the others go on with its weights."""

    def update_engine_weights(self, actor: Any) -> None:
        engine = self.inference_engine
        engine.revoke_weights = lambda why: None  # type: ignore[union-attr, method-assign]
        super().update_engine_weights(actor)


@saboteur("GEN-1", world=2)
class SplitsEvenly(PlainStrategy):
    """All ranks' completions are divided evenly among them: LightRFT's."""

    def gather_and_generate(self, *arguments: Any, **more: Any) -> Any:
        import torch.distributed as dist

        own = super().gather_and_generate(*arguments, **more)
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, own)
        flat = [it for part in everyone for it in part]
        share = len(flat) // self.world.size
        return flat[self.world.rank * share : (self.world.rank + 1) * share]


@saboteur("GEN-3")
class PrefersTokens(FakeStrategy):
    """With both kinds of prompts, the token ids are taken."""

    def engine_generate_local(
        self, sampling_params: Any, prompt_token_ids: Any = None, multi_modal_inputs: Any = None
    ) -> Any:
        if prompt_token_ids is not None:
            multi_modal_inputs = None
        return super().engine_generate_local(sampling_params, prompt_token_ids, multi_modal_inputs)


# Engines


@saboteur("SYNC-1", engine=True)
class LeavesOneOut(FakeEngine):
    """One projection never arrives."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        own = dict(self._model.module.named_parameters())
        before = {name: p.detach().clone() for name, p in own.items() if "linear" in name and not p.is_meta}
        super()._load(buckets)
        for name, value in before.items():
            dict(self._model.module.named_parameters())[name].data.copy_(value)


@saboteur("SYNC-1", engine=True)
class RoundsWeights(FakeEngine):
    """fp32 weights arrive rounded to bf16."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        super()._load([(name, tensor.bfloat16()) for name, tensor in bucket] for bucket in buckets)


@saboteur("SYNC-4", engine=True)
class CountsBuckets(FakeEngine):
    """The version rises with each bucket."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        def counted() -> Iterator[Bucket]:
            for bucket in buckets:
                self._version += 1
                yield bucket

        super()._load(counted())


@saboteur("SYNC-4", engine=True)
class OldVersions(FakeEngine):
    """Completions carry the version of the first sync."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return [replace(it, weight_version=1) for it in super()._generate(prompts, sampling)]


@saboteur("SYNC-8", engine=True)
class NeverStale(FakeEngine):
    """A sync that died half-way is forgotten."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        try:
            super()._load(buckets)
        except OSError:
            return


@saboteur("SYNC-8", engine=True)
class DropsInSilence(FakeEngine):
    """After a sleep that dropped the weights, the engine generates from what is left."""

    @override
    def _sleep(self, level: int) -> None:
        super()._sleep(1)
        self._stale = None


@saboteur("SYNC-8", engine=True)
class TakesParts(FakeEngine):
    """A stream that lacks a tensor is committed."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        try:
            super()._load(buckets)
        except RuntimeError:
            return


@saboteur("GEN-1", engine=True)
class SamplesAcross(FakeEngine):
    """With n samples, the prompts alternate."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        found = super()._generate(prompts, sampling)
        return [found[index * sampling.n + sample] for sample in range(sampling.n) for index in range(len(prompts))]


@saboteur("GEN-2", engine=True)
class GreedyIsCold(FakeEngine):
    """Greedy generation is sampling at a low temperature."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        cold = replace(sampling, temperature=2.0) if sampling.greedy else sampling
        return super()._generate(prompts, cold)


@saboteur("GEN-2", engine=True)
class IgnoresSeeds(FakeEngine):
    """A seed changes nothing."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return super()._generate(prompts, replace(sampling, seed=None))


@saboteur("GEN-2", engine=True)
class OneSample(FakeEngine):
    """All samples of a prompt are the same."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        found = super()._generate(prompts, replace(sampling, n=1))
        return [it for it in found for _ in range(sampling.n)]


@saboteur("GEN-2", engine=True)
class OneStreamForAllPrompts(FakeEngine):
    """With a seed, all prompts are drawn from one stream."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        if sampling.seed is None or sampling.greedy:
            return super()._complete(prompt, sampling, seed, sample)
        drawn = torch.rand(sampling.max_tokens, generator=torch.Generator().manual_seed(seed + sample)).tolist()
        with patch.object(fake_engine, "uniform", lambda key, position: drawn[position]):
            return super()._complete(prompt, sampling, seed, sample)


@saboteur("GEN-6", engine=True)
class TemperedLogprobs(FakeEngine):
    """Log-probabilities are those after temperature."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        found = super()._generate(prompts, sampling)
        scale = sampling.temperature or 1.0
        return [replace(it, logprobs=tuple(value / scale for value in it.logprobs or ())) for it in found]
