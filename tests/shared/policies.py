"""Training a language model by its per-token log-probabilities and entropies: what a rank does, and plain torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import training
from llamas import falcon, llama
from programs import DECAY, RATE
from torch import nn

from lightrft.config import UnsupportedOperationError
from lightrft.strategy import StrategyBase
from lightrft.strategy.backend.adamw import adamw

TEMPERATURE = 0.7
UPDATES = 3


@dataclass(kw_only=True)
class Trained:
    """The results of a run: one rank's tensors of each update, and the weights at the end."""

    log_probs: list[torch.Tensor]
    entropies: list[torch.Tensor]
    parameters: dict[str, torch.Tensor]

    def distance(self, other: "Trained") -> float:
        """Largest difference of a log-probability or an entropy."""
        mine, others = (results.log_probs + results.entropies for results in (self, other))
        return max(float((a - b).abs().max()) for a, b in zip(mine, others, strict=True))

    def parameter_distance(self, other: "Trained") -> float:
        """Largest difference of a weight."""
        return max(
            float((parameter - other.parameters[name]).abs().max()) for name, parameter in self.parameters.items()
        )


def batch(update: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (2, 9), padded on the left and on the right, and their mask."""
    generator = torch.Generator().manual_seed(100 * update + rank)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, : 1 + rank] = mask[1, 7 - rank :] = 0
    return torch.randint(3, 17, (2, 9), generator=generator), mask


def loss_of(log_probs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A policy loss with an entropy bonus, and a different gradient for each token."""
    weights = torch.linspace(-1, 2, log_probs.numel()).view_as(log_probs)
    return (weights * log_probs.exp()).mean() - 0.1 * entropy.mean()


def train(made: StrategyBase, model: nn.Module, checkpointing: bool = False) -> Trained:
    """Train ``model`` with ``made``, which is prepared here; all ranks call this."""
    optimizer = made.create_optimizer(model, lr=RATE, weight_decay=DECAY)
    model, optimizer, _ = made.prepare((model, optimizer, None))
    inner: Any = made.unwrap_model(model)
    inner.train()
    if checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    results = Trained(log_probs=[], entropies=[], parameters={})
    for update in range(UPDATES):
        ids, mask = batch(update, made.get_rank())
        result = made.token_log_probs(model, ids, mask, temperature=TEMPERATURE, entropy=True, use_cache=False)
        assert result.entropy is not None
        made.backward(loss_of(*result), model, optimizer)
        made.optimizer_step(optimizer, model)
        results.log_probs.append(result.log_probs.detach())
        results.entropies.append(result.entropy.detach())
        with torch.inference_mode():
            alone = made.token_log_probs(model, ids, mask)
        assert alone.entropy is None
        results.log_probs.append(alone.log_probs.clone())
    results.parameters = training.full_parameters(made, model)
    return results


def refusals_of_packing(made: StrategyBase) -> list[str]:
    """The errors of a Llama and a Falcon where rank 0 has packed sequences and the others do not."""
    tokens, errors = torch.tensor([[1, 5, 9, 4, 7]]), []
    positions = torch.tensor([[0, 1, 0, 1, 2] if made.get_rank() == 0 else range(5)])
    for model in (llama(), falcon()):
        try:
            made.token_log_probs(made.prepare(model), tokens, position_ids=positions)
            errors.append("")
        except UnsupportedOperationError as error:
            errors.append(str(error))
    return errors


def reference(build: Callable[[], Any], ranks: int, rank: int) -> Trained:
    """The same in plain torch, from the logits, one process for all ranks; the tensors are those of ``rank``."""
    model = build()
    optimizer = adamw(model, lr=RATE, weight_decay=DECAY)
    results = Trained(log_probs=[], entropies=[], parameters={})
    for update in range(UPDATES):
        for other in range(ranks):
            log_probs, entropy = _from_logits(model, *batch(update, other), TEMPERATURE)
            (loss_of(log_probs, entropy) / ranks).backward()
            if other == rank:
                results.log_probs.append(log_probs.detach())
                results.entropies.append(entropy.detach())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            results.log_probs.append(_from_logits(model, *batch(update, rank), 1.0)[0])
    results.parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return results


def _from_logits(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = torch.distributions.Categorical(logits=model(ids, attention_mask=mask).logits[:, :-1] / temperature)
    kept = mask[:, 1:] * mask[:, :-1]
    return distribution.log_prob(ids[:, 1:]) * kept, distribution.entropy() * kept
