"""The deterministic engine: the simplest correct generation, with which other engines must agree.

It completes one sequence at a time, with a whole forward pass for each token: no cache, no padding, no batches. It
needs no model library and no GPU.
"""

from collections.abc import Sequence
from typing import Self

import torch
from typing_extensions import override

from lightrft.config import EngineError
from lightrft.strategy.rollout.embedded import EmbeddedEngine
from lightrft.strategy.rollout.engine import Completion, EngineCapabilities, EngineRequest, Prompt
from lightrft.strategy.rollout.sampling import Sampling, apply_penalties, random_key, sample_tokens, uniform


class FakeEngine(EmbeddedEngine):
    """Generates from a copy of the actor, one token at a time."""

    capabilities = EngineCapabilities(seeds_by_prompt=True, sleep_levels=frozenset({1, 2}))

    def __init__(self, request: EngineRequest) -> None:
        super().__init__(request, "fake", has_weights=False)
        positions = getattr(getattr(self._model.module, "config", None), "max_position_embeddings", None)
        self.max_model_len = positions if positions and positions > 0 else None  # XLNet, without a limit, has -1

    @classmethod
    @override
    def build(cls, request: EngineRequest) -> Self:
        return cls(request)

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        seed = self._call_seed(sampling)
        return [self._complete(prompt, sampling, seed, sample) for prompt in prompts for sample in range(sampling.n)]

    @torch.no_grad()
    def _complete(self, prompt: Prompt, sampling: Sampling, seed: int, sample: int) -> Completion:
        if not prompt.token_ids:
            raise EngineError(
                "FakeEngine: generate expected token ids, got text alone. It has no tokenizer; pass token ids"
            )
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else self.eos_token_ids)
        key = random_key(seed, prompt.token_ids, sample)
        output: list[int] = []
        logprobs: list[float] = []
        room = sampling.max_tokens if self.max_model_len is None else self.max_model_len - len(prompt.token_ids)
        while len(output) < min(room, sampling.max_tokens) and not (output and output[-1] in ends):
            tokens_1T = torch.tensor([[*prompt.token_ids, *output]], device=self._device)
            logits_1V = self._model.logits(tokens_1T)[:, -1].float()
            allowed_1V = apply_penalties(logits_1V, [prompt.token_ids], [output], sampling)
            if len(output) < sampling.min_tokens and ends:
                allowed_1V = allowed_1V.index_fill(1, torch.tensor(sorted(ends), device=self._device), -torch.inf)
            token = int(sample_tokens(allowed_1V, sampling, [uniform(key, len(output))]))
            output.append(token)
            logprobs.append(float(logits_1V.log_softmax(dim=-1)[0, token]))
        return Completion(
            prompt_token_ids=prompt.token_ids,
            output_token_ids=tuple(output),
            logprobs=tuple(logprobs),
            finish_reason="stop" if output[-1] in ends else "length",
            weight_version=self.weight_version,
        )
