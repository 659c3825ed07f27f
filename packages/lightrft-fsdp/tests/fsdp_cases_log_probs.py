"""What a rank does in `test_fsdp_log_probs`."""

from typing import Any

import fsdp_cases
import policies
import torch
from llamas import falcon, llama, with_adapter
from programs import Program

from lightrft.config import UnsupportedOperationError


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
    """The errors of two models where rank 0 has packed sequences and the others do not; Falcon does not see them."""
    tokens = torch.tensor([[1, 5, 9, 4, 7]])
    errors = []
    with fsdp_cases.strategy(Program(), fused_linear_logprob=True) as made:
        positions = torch.tensor([[0, 1, 0, 1, 2] if made.get_rank() == 0 else range(5)])
        for model in (llama(), falcon()):
            try:
                made.token_log_probs(made.prepare(model), tokens, position_ids=positions)
                errors.append("")
            except UnsupportedOperationError as error:
                errors.append(str(error))
    return errors
