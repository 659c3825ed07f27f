"""What a rank does in `test_deepspeed_precision`."""

from typing import Any

import ds_cases
import torch
import training
from programs import Program
from torch import nn


class Weights(nn.Module):
    """Two weights; what it is called with is their gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.weights * gradient).sum()


def descended(
    gradients: list[float], accumulation_steps: int, rate: float, **settings: Any
) -> tuple[list[float], list[float]]:
    """SGD with these gradients, one a micro-batch, on both weights: the weights and the norms."""
    norms = []
    with ds_cases.strategy(
        Program(accumulation_steps=accumulation_steps), bf16=True, persist=False, **settings
    ) as made:
        model: nn.Module = Weights()
        model, optimizer, _ = made.prepare((model, torch.optim.SGD(model.parameters(), lr=rate), None))
        for gradient in gradients:
            made.backward(model(torch.full((2,), gradient)).float(), model, optimizer)
            result = made.optimizer_step(optimizer, model)
            norms += [] if result.grad_norm is None else [result.grad_norm]
        return training.full_parameters(made, model)["weights"].tolist(), norms


def called_with_floats(**settings: Any) -> tuple[torch.Tensor, torch.dtype, torch.dtype]:
    with ds_cases.strategy(Program(), bf16=True, **settings) as made:
        model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        model, optimizer, _ = made.prepare((model, torch.optim.SGD(model.parameters(), lr=1.0), None))
        inputs = torch.ones(5, 3)
        outputs = model(input=inputs) if settings["zero_stage"] == 2 else model(inputs)
        made.backward(outputs.float().sum(), model, optimizer)
        assert made.optimizer_step(optimizer, model).applied
        return outputs.detach().float(), outputs.dtype, inputs.dtype
