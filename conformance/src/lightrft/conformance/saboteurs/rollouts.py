"""Defects of rollouts, of strategies and of engines."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import Options
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import Completion, EngineStatus, FakeStrategy, Prompt, RolloutEngine, Sampling
from lightrft.strategy.models import weight_stream
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout import fake_engine
from lightrft.strategy.rollout.fake_engine import FakeEngine

# mypy: disable-error-code="misc"


@saboteur("ENG-1")
class AlwaysAwake(FakeStrategy):
    """inference_engine_status is AWAKE wherever there is an engine."""

    @property
    def inference_engine_status(self) -> EngineStatus:
        return EngineStatus.ABSENT if self.inference_engine is None else EngineStatus.AWAKE


@saboteur("ENG-1")
class SleepsAfterErrors(FakeStrategy):
    """After an exception, the engine sleeps even with enable_engine_sleep=False."""

    def gather_and_generate(self, *arguments: Any, **more: Any) -> Any:
        try:
            return super().gather_and_generate(*arguments, **more)
        except Exception:
            if self.inference_engine is not None:
                self.inference_engine.sleep()
            raise


@saboteur("ENG-1")
class SleepsUnasked(FakeStrategy):
    """The engine sleeps even with enable_engine_sleep=False."""

    def maybe_sleep_inference_engine(self) -> None:
        if self.inference_engine is not None:
            self.inference_engine.sleep()


@saboteur("ENG-2")
class FallsBackToFakeEngine(FakeStrategy):
    """An unknown engine_type builds the fake engine."""

    def setup_inference_engine(
        self, args: object = None, engine_type: str | None = None, actor: nn.Module | None = None
    ) -> RolloutEngine | None:
        try:
            return super().setup_inference_engine(args, engine_type, actor)
        except Exception:  # noqa: BLE001
            return super().setup_inference_engine(args, "fake", actor)


@saboteur("ENG-3")
class GeneratesNothing(FakeStrategy):
    """Without an engine, generating returns an empty list: LightRFT's FakeStrategy."""

    def gather_and_generate(self, *arguments: Any, **more: Any) -> Any:
        return [] if self.inference_engine is None else super().gather_and_generate(*arguments, **more)


@saboteur("ENG-3")
class SyncsSilently(FakeStrategy):
    """Without an engine, a sync does nothing and prints no message."""

    def update_engine_weights(self, actor: nn.Module) -> None:
        if self.inference_engine is not None:
            super().update_engine_weights(actor)


@saboteur("SYNC-1")
class SyncsOnce(FakeStrategy):
    """Only the first sync sends weights."""

    _synced = False

    def update_engine_weights(self, actor: nn.Module) -> None:
        if not self._synced:
            super().update_engine_weights(actor)
        self._synced = self.inference_engine is not None


@saboteur("SYNC-1")
class SendsBiasesLate(FakeStrategy):
    """Each sync sends the biases of the sync before."""

    _last: dict[str, torch.Tensor] = {}

    def update_engine_weights(self, actor: nn.Module) -> None:
        full_parameters = weight_stream.full_parameters

        def late(*arguments: Any) -> Iterator[Bucket]:
            for bucket in full_parameters(*arguments):
                last, self._last = self._last, {**self._last, **{name: tensor.clone() for name, tensor in bucket}}
                yield [(name, last.get(name, tensor) if name.endswith("bias") else tensor) for name, tensor in bucket]

        with patch.object(weight_stream, "full_parameters", late):
            super().update_engine_weights(actor)


@saboteur("SYNC-3")
class AlwaysTheFirst(FakeStrategy):
    """Every sync sends the first actor, whichever is passed: LightRFT's."""

    _first: nn.Module | None = None

    def update_engine_weights(self, actor: nn.Module) -> None:
        self._first = self._first or actor
        super().update_engine_weights(self._first)


@saboteur("SYNC-2")
class IgnoresSyncErrors(FakeStrategy):
    """Errors of a sync are ignored."""

    def update_engine_weights(self, actor: nn.Module) -> None:
        try:
            super().update_engine_weights(actor)
        except RuntimeError:
            return


@saboteur("SYNC-9", world=2)
class CommitsAlone(PlainStrategy):
    """If a sync fails on one rank, the engines of the other ranks keep its weights."""

    def update_engine_weights(self, actor: nn.Module) -> None:
        engine = self.inference_engine
        engine.invalidate_weights = lambda why: None  # type: ignore[union-attr, method-assign]
        super().update_engine_weights(actor)


@saboteur("GEN-1", world=2)
class SplitsEvenly(PlainStrategy):
    """The completions of all ranks are divided evenly among them: LightRFT's."""

    def gather_and_generate(self, *arguments: Any, **more: Any) -> Any:
        import torch.distributed as dist

        local = super().gather_and_generate(*arguments, **more)
        by_rank: list[list[Completion]] = [[]] * self.world.size
        dist.all_gather_object(by_rank, local)
        flat = [completion for completions in by_rank for completion in completions]
        share = len(flat) // self.world.size
        return flat[self.world.rank * share : (self.world.rank + 1) * share]


@saboteur("GEN-3")
class PrefersTokens(FakeStrategy):
    """With both kinds of prompts, token ids are used and the others ignored."""

    def engine_generate_local(
        self,
        sampling_params: object,
        prompt_token_ids: Sequence[object] | None = None,
        multi_modal_inputs: Sequence[Options] | None = None,
    ) -> list[Completion]:
        if prompt_token_ids is not None:
            multi_modal_inputs = None
        return super().engine_generate_local(sampling_params, prompt_token_ids, multi_modal_inputs)


# Engines


@saboteur("SYNC-1")
class LeavesOneOut(FakeEngine):
    """One projection is not loaded."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        parameters = self._model.module.named_parameters()
        before = {name: p.detach().clone() for name, p in parameters if "linear" in name and not p.is_meta}
        super()._load(buckets)
        for name, value in before.items():
            dict(self._model.module.named_parameters())[name].data.copy_(value)


@saboteur("SYNC-1")
class RoundsWeights(FakeEngine):
    """Weights are rounded to bf16."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        super()._load([(name, tensor.bfloat16()) for name, tensor in bucket] for bucket in buckets)


@saboteur("SYNC-4")
class CountsBuckets(FakeEngine):
    """weight_version increases with each bucket."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        def counted() -> Iterator[Bucket]:
            for bucket in buckets:
                self._version += 1
                yield bucket

        super()._load(counted())


@saboteur("SYNC-4")
class OldVersions(FakeEngine):
    """Completions have the weight_version of the first sync."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return [replace(done, weight_version=1) for done in super()._generate(prompts, sampling)]


@saboteur("SYNC-8")
class NeverStale(FakeEngine):
    """A sync that failed half-way counts as complete."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        try:
            super()._load(buckets)
        except OSError:
            return


@saboteur("SYNC-8")
class GeneratesWithoutWeights(FakeEngine):
    """After a sleep that drops the weights, the engine still generates."""

    @override
    def _sleep(self, level: int) -> None:
        super()._sleep(1)
        self._stale = None


@saboteur("SYNC-8")
class CommitsPartialSync(FakeEngine):
    """A sync without all tensors counts as complete."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        try:
            super()._load(buckets)
        except RuntimeError:
            return


@saboteur("GEN-1")
class SamplesAcross(FakeEngine):
    """With n samples, the completions of the prompts alternate."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        completions = super()._generate(prompts, sampling)
        return [
            completions[index * sampling.n + sample] for sample in range(sampling.n) for index in range(len(prompts))
        ]


@saboteur("GEN-2")
class GreedySamples(FakeEngine):
    """Greedy generation samples."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return super()._generate(prompts, replace(sampling, temperature=2.0) if sampling.greedy else sampling)


@saboteur("GEN-2")
class IgnoresSeeds(FakeEngine):
    """The seed is ignored."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return super()._generate(prompts, replace(sampling, seed=None))


@saboteur("GEN-2")
class OneSample(FakeEngine):
    """All samples of a prompt are the same."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        completions = super()._generate(prompts, replace(sampling, n=1))
        return [completion for completion in completions for _ in range(sampling.n)]


@saboteur("GEN-2")
class OneStreamForAllPrompts(FakeEngine):
    """With a seed, all prompts use one random stream."""

    @override
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        if sampling.seed is None or sampling.greedy:
            return super()._complete(prompt, sampling, seed, sample)
        drawn = torch.rand(sampling.max_tokens, generator=torch.Generator().manual_seed(seed + sample)).tolist()
        with patch.object(fake_engine, "uniform", lambda key, position: drawn[position]):
            return super()._complete(prompt, sampling, seed, sample)


@saboteur("GEN-6")
class TemperedLogprobs(FakeEngine):
    """Log-probabilities are divided by the temperature."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        scale = sampling.temperature or 1.0
        return [
            replace(done, logprobs=tuple(value / scale for value in done.logprobs or ()))
            for done in super()._generate(prompts, sampling)
        ]
