"""Running a program through a strategy: what a rank does."""

from typing import Any

import torch
from programs import Program
from torch import nn
from torch.optim import Optimizer

from lightrft.strategy import StepResult, StrategyBase


def run(
    program: Program, made: StrategyBase, model: nn.Module, optimizer: Optimizer, scheduler: Any = None
) -> list[StepResult]:
    """Run ``program`` on a prepared model."""
    results = []
    for update, micro, last in program.micro_batches():
        backward(program, made, model, optimizer, update, micro)
        boundary = last if program.lengths else None
        schedule = scheduler if program.decaying_rate else None
        results.append(made.optimizer_step(optimizer, model, schedule, boundary=boundary))
    return results


def backward(
    program: Program, made: StrategyBase, model: nn.Module, optimizer: Optimizer, update: int, micro: int
) -> None:
    """The losses of one micro-batch, in one of the ways in which trainers have them."""

    def loss(second: bool = False) -> torch.Tensor:
        value = program.loss(model, update, micro, made.get_rank(), second)
        poisoned = update in program.poisoned and made.get_rank() == made.world_size - 1
        return value * float("nan") if poisoned else value

    if program.losses == "one":
        made.backward(loss(), model, optimizer)
    elif program.losses == "forward, backward, forward, backward":
        made.backward(loss(), model, optimizer)
        made.backward(loss(second=True), model, optimizer)
    elif program.losses == "forward, forward, backward, backward":
        first, other = loss(), loss(second=True)
        made.backward(first, model, optimizer)
        made.backward(other, model, optimizer)
    elif program.losses == "forward, forward, one backward":
        made.backward(loss() + loss(second=True), model, optimizer)
    else:
        raise ValueError(program.losses)


def full_parameters(
    made: StrategyBase, model: nn.Module, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """All parameters and buffers under their saved names."""
    return {name: tensor.clone() for bucket in made.full_parameters(model, dtype=dtype) for name, tensor in bucket}
