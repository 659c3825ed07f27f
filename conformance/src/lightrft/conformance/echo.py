"""Engines that say what they were asked: for judging what a strategy makes of prompts, media, and syncs that fail."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from typing_extensions import override

from lightrft.config import EngineError
from lightrft.strategy import Completion, EngineBase, EngineCapabilities, EngineRequest, Prompt, Sampling
from lightrft.strategy.rollout.engine import Part
from lightrft.strategy.rollout.weights import Bucket


class EchoEngine(EngineBase):
    """Completes every prompt with a description of it, as text."""

    capabilities = EngineCapabilities(multimodal=True, stop_strings=True)

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        return cls(has_weights=True)

    @property
    @override
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        return None

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return [self._echo(prompt) for prompt in prompts for _ in range(sampling.n)]

    def _echo(self, prompt: Prompt) -> Completion:
        said = {"text": prompt.text, "images": prompt.images, "videos": prompt.videos}
        return Completion(
            prompt_token_ids=prompt.token_ids or (), output_token_ids=(0,), logprobs=(0.0,), finish_reason="stop",
            weight_version=self.weight_version, text=json.dumps(said),
        )  # fmt: skip

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        for _ in buckets:
            pass

    @override
    def _sleep(self, level: int) -> None:
        """There is nothing to give back."""

    @override
    def _wake(self, parts: frozenset[Part]) -> None:
        """There is nothing to take."""

    @override
    def _shutdown(self) -> None:
        """There is nothing to end."""


class FrailEngine(EchoEngine):
    """Echoes; the sync after its first dies half-way on rank 1, and ends well on all others."""

    _rank = 0
    _died = False

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        engine = super().build(request)
        engine._rank = request.rank
        return engine

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        if self._rank == 1 and self.weight_version and not self._died:
            self._died = True
            next(buckets)
            raise EngineError("this engine's second sync dies")
        super()._load(buckets)
