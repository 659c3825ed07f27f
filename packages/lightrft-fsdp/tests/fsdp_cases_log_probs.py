"""What a rank does in `test_fsdp_log_probs`."""

from typing import Any

import fsdp_cases
import policies
import torch
from llamas import llama, with_adapter
from programs import Program


def trained(tied: bool = True, adapter: bool = False, checkpointing: bool = False, **settings: Any) -> policies.Trained:
    with fsdp_cases.strategy(Program(), **settings) as made:
        return policies.train(made, with_adapter() if adapter else llama(tied), checkpointing)


def refused() -> str:
    """The error of a loss of another model, whose log-probabilities were computed chunk by chunk."""
    with fsdp_cases.strategy(Program(), fused_linear_logprob=True) as made:
        model, optimizer = fsdp_cases.prepared(made, llama())
        other, _ = fsdp_cases.prepared(made, llama())
        loss = made.token_log_probs(other, torch.tensor([[1, 5, 9]])).log_probs.sum()
        try:
            made.backward(loss, model, optimizer)
        except RuntimeError as error:
            return str(error)
        return ""


def packed_on_rank_0() -> list[str]:
    with fsdp_cases.strategy(Program(), fused_linear_logprob=True) as made:
        return policies.refusals_of_packing(made)
