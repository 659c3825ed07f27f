"""Defects of sampling: seeds, filters, penalties and prompts."""

from collections.abc import Sequence
from dataclasses import replace

from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.strategy import Completion, Prompt, Sampling
from lightrft.strategy.rollout.fake_engine import FakeEngine

# mypy: disable-error-code="misc"


@saboteur("GEN-1")
class NeedsPrompts(FakeEngine):
    """A rank without prompts raises."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        if not prompts:
            raise ValueError("generate: expected prompts, got none")
        return super().generate(prompts, sampling)


@saboteur("GEN-2")
class OneSampleOfEach(FakeEngine):
    """Without a seed, all samples of a prompt are the same."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        if sampling.seed is not None:
            return super()._generate(prompts, sampling)
        once = super()._generate(prompts, replace(sampling, n=1))
        return [completion for completion in once for _ in range(sampling.n)]


@saboteur("GEN-2")
class ShortSeeds(FakeEngine):
    """Only the low 16 bits of a seed count."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        seed = None if sampling.seed is None else sampling.seed % 2**16
        return super()._generate(prompts, replace(sampling, seed=seed))


@saboteur("GEN-9")
class OneFilterAtATime(FakeEngine):
    """With top_k, top_p is ignored."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return super()._generate(prompts, replace(sampling, top_p=1.0) if sampling.top_k > 0 else sampling)


@saboteur("GEN-10")
class NegativePenaltyIgnored(FakeEngine):
    """A negative frequency penalty is ignored."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        frequency = max(0.0, sampling.frequency_penalty)
        return super()._generate(prompts, replace(sampling, frequency_penalty=frequency))
