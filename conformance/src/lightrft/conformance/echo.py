"""Engines that return the requests they get, for clauses about prompts, media and failed syncs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from typing_extensions import override

from lightrft.config import EngineError
from lightrft.strategy import Completion, EngineBase, EngineCapabilities, EngineRequest, Prompt, Sampling
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout.engine import Part


class EchoEngine(EngineBase):
    """Completes every prompt with its text, images and videos as JSON."""

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
        request = {"text": prompt.text, "images": prompt.images, "videos": prompt.videos}
        return Completion(
            prompt_token_ids=prompt.token_ids or (), output_token_ids=(0,), logprobs=(0.0,), finish_reason="stop",
            weight_version=self.weight_version, text=json.dumps(request),
        )  # fmt: skip

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        for _ in buckets:
            pass

    @override
    def _sleep(self, level: int) -> None:
        """Nothing to free."""

    @override
    def _wake(self, parts: frozenset[Part]) -> None:
        """Nothing to allocate."""

    @override
    def _shutdown(self) -> None:
        """Nothing to end."""


class FailingSyncEngine(EchoEngine):
    """Its second sync fails on rank 1, after part of it, and succeeds on the other ranks."""

    _rank = 0
    _failed = False

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        engine = super().build(request)
        engine._rank = request.rank
        return engine

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        if self._rank == 1 and self.weight_version and not self._failed:
            self._failed = True
            next(buckets)
            raise EngineError("the second sync of this engine fails")
        super()._load(buckets)
