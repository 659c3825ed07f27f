"""Defects of per-token log-probabilities."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.strategy import FakeStrategy, LogProbs
from lightrft.strategy.models.heads import find_head

# The overridden method is final: a type checker would find these saboteurs.
# mypy: disable-error-code="misc"


class LogProbHooks(FakeStrategy):
    """Hooks before and after token_log_probs."""

    def token_log_probs(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> LogProbs:
        self.before(model)
        if attention_mask is not None:
            options["targets"] = self.targets(input_ids, attention_mask)
        options |= self.more(options)
        options["temperature"] = self.temperature(options["temperature"])
        return self.result(super().token_log_probs(model, input_ids, attention_mask, **options))

    def before(self, model: nn.Module) -> None:
        """Act before the call."""

    def temperature(self, given: float) -> float:
        """Return the temperature."""
        return given

    def targets(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the tokens whose log-probabilities are read."""
        return input_ids[:, 1:].masked_fill(attention_mask[:, 1:] * attention_mask[:, :-1] == 0, -100)

    def more(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return further arguments."""
        return {}

    def result(self, result: LogProbs) -> LogProbs:
        """Return what the call returns."""
        return result


@saboteur("LOGP-1")
class EntropyWithoutGradient(LogProbHooks):
    """The entropy has no gradient."""

    @override
    def result(self, result: LogProbs) -> LogProbs:
        return result._replace(entropy=None if result.entropy is None else result.entropy.detach())


@saboteur("LOGP-1")
class ForgetsTemperature(LogProbHooks):
    """The temperature is ignored when log-probabilities are computed without the logits."""

    @override
    def temperature(self, given: float) -> float:
        return 1.0 if self.config.fused_linear_logprob else given


@saboteur("LOGP-1")
class TokensInPlace(LogProbHooks):
    """Reads at each position the token at that position, not the next one."""

    @override
    def targets(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids[:, :-1].masked_fill(attention_mask[:, 1:] == 0, -100)


@saboteur("LOGP-1")
class ReadsPadding(LogProbHooks):
    """Padding has log-probabilities too."""

    @override
    def targets(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids[:, 1:]


@saboteur("LOGP-1")
class ReadsFromPadding(LogProbHooks):
    """The first token after padding has a log-probability, which depends on the padding."""

    @override
    def targets(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)


@saboteur("LOGP-1")
class MixesPackedSequences(LogProbHooks):
    """The model makes a cache, so that transformers does not look for packed sequences."""

    @override
    def more(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"use_cache": True} if "position_ids" in options else {}


@saboteur("LOGP-2")
class AssumesPlainHead(LogProbHooks):
    """Treats the output of the head as the logits of every model, without a check."""

    @override
    def before(self, model: nn.Module) -> None:
        prepared = self._models.require_ready(model, "token_log_probs")
        prepared.head = find_head(prepared.module, prepared.class_name, "token_log_probs", "")
