"""What a rank does in `test_deepspeed_log_probs`."""

from typing import Any

import ds_cases
import policies
import torch
from llamas import llama, with_adapter
from programs import Program
from torch import nn


def trained(tied: bool = True, adapter: bool = False, checkpointing: bool = False, **settings: Any) -> policies.Trained:
    with ds_cases.strategy(Program(), **settings) as made:
        return policies.train(made, with_adapter() if adapter else llama(tied), checkpointing)


def refused(**settings: Any) -> str:
    """The error of a loss of another model, whose log-probabilities were computed chunk by chunk."""
    with ds_cases.strategy(Program(), fused_linear_logprob=True, **settings) as made:
        models: list[nn.Module] = [llama(), llama()]
        optimizers = [made.create_optimizer(model, lr=1e-3) for model in models]
        model, other = (made.prepare((*pair, None))[0] for pair in zip(models, optimizers, strict=True))
        loss = made.token_log_probs(other, torch.tensor([[1, 5, 9]])).log_probs.sum()
        try:
            made.backward(loss, model, optimizers[0])
        except RuntimeError as error:
            return str(error)
        return ""


def packed_on_rank_0(**settings: Any) -> list[str]:
    with ds_cases.strategy(Program(), fused_linear_logprob=True, **settings) as made:
        return policies.refusals_of_packing(made)
