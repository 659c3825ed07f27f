"""Defects of per-token log-probabilities."""

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
        else:
            options |= self.packed(input_ids, options["position_ids"])
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

    def packed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return further arguments for packed sequences."""
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
    """The positions go on from one packed sequence to the next."""

    @override
    def packed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        targets = input_ids[:, 1:].masked_fill(position_ids[:, 1:] == 0, -100)
        return {"targets": targets, "position_ids": torch.arange(input_ids.shape[1]).expand_as(input_ids)}


@saboteur("LOGP-2")
class AssumesPlainHead(LogProbHooks):
    """Treats the output of the head as the logits of every model, without a check."""

    @override
    def before(self, model: nn.Module) -> None:
        prepared = self._models.require_ready(model, "token_log_probs")
        prepared.head = find_head(prepared.module, prepared.class_name, "token_log_probs", "")


@saboteur("LOGP-3")
class TrustsEveryModel(LogProbHooks):
    """Computes packed sequences in every model, without looking whether it attends across them."""

    @override
    def before(self, model: nn.Module) -> None:
        self._models.require_ready(model, "token_log_probs").keeps_packed_apart = True
