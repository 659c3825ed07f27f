"""Draws tokens for a batch of sequences until each has ended.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from lightrft.engines.transformers.decoders import decoder_of
from lightrft.strategy.engine import Sampling, apply_penalties, sample_tokens, uniform

COMPACT_BELOW = 0.75
"""When less than this fraction of the rows is unfinished, the finished rows leave the batch."""


@dataclass(kw_only=True)
class Row:
    """One sequence."""

    prompt: Sequence[int]
    key: bytes
    """The key of its random stream."""
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    """Whether an end-of-sequence or stop token ended it."""


class Batch:
    """Sequences that are decoded together until each has stopped or reached its length limit."""

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        ends: frozenset[int],
        device: torch.device,
        max_model_len: int | None,
    ) -> None:
        """Prepare to decode.

        Args:
            model: A causal language model.
            sampling: How tokens are drawn.
            ends: Token ids that end a sequence.
            device: The model's device.
            max_model_len: The length in tokens, prompt included, at which a sequence ends; None for no limit.
        """
        self._model, self._sampling, self._ends, self._device = model, sampling, ends, device
        self._max_model_len = max_model_len
        self._stop_token_ids = torch.tensor(sorted(ends), device=device)

    @torch.no_grad()
    def complete(self, prompts: Sequence[Sequence[int]], keys: Sequence[Sequence[bytes]]) -> list[Row]:
        """Complete each prompt once for each of its ``keys``.

        Args:
            prompts: Token ids.
            keys: Keys of random streams, the same number for every prompt.

        Returns: The rows of the first prompt, then those of the next.
        """
        rows = [
            Row(prompt=prompt, key=key)
            for prompt, prompt_keys in zip(prompts, keys, strict=True)
            for key in prompt_keys
        ]
        decoder = decoder_of(self._model, self._device)
        logits_BV = decoder.start(prompts, samples=len(keys[0]))
        live = rows
        while True:
            self._extend(live, logits_BV)
            unfinished = [index for index, row in enumerate(live) if not self._is_done(row)]
            if not unfinished:
                return rows
            if len(unfinished) < COMPACT_BELOW * len(live):
                decoder.keep(unfinished)
                live = [live[index] for index in unfinished]
            logits_BV = decoder.extend([row.output[-1] for row in live])

    def _extend(self, live: Sequence[Row], logits_BV: torch.Tensor) -> None:
        """Draw the next token of every unfinished row."""
        allowed_BV = apply_penalties(
            logits_BV, [row.prompt for row in live], [row.output for row in live], self._sampling
        )
        early = [index for index, row in enumerate(live) if len(row.output) < self._sampling.min_tokens]
        if early and self._ends:
            allowed_BV = allowed_BV.clone()
            allowed_BV[torch.tensor(early, device=self._device)[:, None], self._stop_token_ids] = -torch.inf
        numbers = [uniform(row.key, len(row.output)) for row in live]
        drawn_B = sample_tokens(allowed_BV, self._sampling, numbers)
        logprobs_B = logits_BV.gather(1, drawn_B[:, None]).squeeze(1) - logits_BV.logsumexp(dim=-1)
        for row, token, logprob in zip(live, drawn_B.tolist(), logprobs_B.tolist(), strict=True):
            if not self._is_done(row):
                row.output.append(token)
                row.logprobs.append(logprob)
                row.stopped = token in self._ends

    def _is_done(self, row: Row) -> bool:
        made, limit = len(row.output), self._max_model_len
        is_full = limit is not None and len(row.prompt) + made >= limit
        return row.stopped or made >= self._sampling.max_tokens or is_full
