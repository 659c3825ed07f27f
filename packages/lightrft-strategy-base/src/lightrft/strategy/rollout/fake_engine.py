"""The deterministic engine: the plainest generation that is right.

One sequence at a time, a whole forward for each token, no cache, no padding, no batching. It needs no model
library and no GPU; other engines must agree with it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import torch
from typing_extensions import override

from lightrft.config import EngineError
from lightrft.strategy.rollout.embedded import EmbeddedModel
from lightrft.strategy.rollout.engine import (
    PARTS,
    Completion,
    EngineBase,
    EngineCapabilities,
    EngineRequest,
    Part,
    Prompt,
)
from lightrft.strategy.rollout.sampling import Sampling, draw_tokens, penalized, stream_key, uniform
from lightrft.strategy.rollout.weights import Bucket


class FakeEngine(EngineBase):
    """Generates from a copy of the actor, a token at a time."""

    capabilities = EngineCapabilities(seeds_by_prompt=True, sleep_levels=frozenset({1, 2}))

    def __init__(self, request: EngineRequest) -> None:
        super().__init__(has_weights=False)
        self._model = EmbeddedModel(request, "fake")
        self._device = request.device
        self.longest = getattr(getattr(self._model.module, "config", None), "max_position_embeddings", None)
        self._stream = (request.config.seed, request.rank)
        self._calls = 0

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        return cls(request)

    @property
    @override
    def expected_weights(self) -> Mapping[str, torch.Size]:
        return self._model.expected

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        self._model.load(buckets)

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        self._calls += 1
        # Without a seed every call and rank draws something else, and a run repeats.
        seed = sampling.seed if sampling.seed is not None else hash((*self._stream, self._calls))
        return [self._complete(prompt, sampling, seed, sample) for prompt in prompts for sample in range(sampling.n)]

    @torch.no_grad()
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        if not prompt.token_ids:
            raise EngineError("FakeEngine has no tokenizer: a prompt needs at least one token id")
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self._model.end_ids)
        key = stream_key(seed, prompt.token_ids, sample)
        output: list[int] = []
        logprobs: list[float] = []
        most = (
            sampling.max_tokens
            if self.longest is None
            else min(sampling.max_tokens, self.longest - len(prompt.token_ids))
        )
        while len(output) < most and not (output and output[-1] in ends):
            tokens_1T = torch.tensor([[*prompt.token_ids, *output]], device=self._device)
            logits_1V = self._model.logits(tokens_1T)[:, -1].float()
            allowed_1V = penalized(logits_1V, [prompt.token_ids], [output], sampling)
            if len(output) < sampling.min_tokens and ends:
                allowed_1V = allowed_1V.index_fill(1, torch.tensor(sorted(ends), device=self._device), -torch.inf)
            token = int(draw_tokens(allowed_1V, sampling, [uniform(key, len(output))]))
            output.append(token)
            logprobs.append(float(logits_1V.log_softmax(dim=-1)[0, token]))
        return Completion(
            prompt_token_ids=prompt.token_ids,
            output_token_ids=tuple(output),
            logprobs=tuple(logprobs),
            finish_reason="stop" if output[-1] in ends else "length",
            weight_version=self.weight_version,
        )

    @override
    def _sleep(self, level: int) -> None:
        if level == 2:
            self._model.drop()
        else:
            self._model.move(torch.device("cpu"))

    @override
    def _wake(self, parts: frozenset[Part]) -> None:
        if parts & PARTS >= {"weights"}:
            self._model.move(self._device)

    @override
    def _shutdown(self) -> None:
        self._model.drop()
