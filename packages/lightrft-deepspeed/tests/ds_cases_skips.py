"""What a rank does in `test_deepspeed_skips`."""

import ds_cases
import torch
import training
from programs import RATE, Program, mixed, tokens
from torch import nn
from torch.optim import Optimizer

from lightrft.deepspeed import DeepspeedStrategy

State = list[dict[str, torch.Tensor]]


def state_of(optimizer: Optimizer) -> State:
    """Copies of the optimizer's state, whatever it is for."""
    return [{name: value.clone() for name, value in state.items()} for state in optimizer.state.values()]


def after(program: Program, **settings: object) -> tuple[dict[str, torch.Tensor], State, list[tuple[bool, bool]]]:
    """Parameters in fp32, optimizer state, and the results of the updates, at the end of ``program``."""
    with ds_cases.strategy(program, **settings) as made:
        model, optimizer, _ = prepared(made)
        results = training.run(program, made, model, optimizer)
        seen = [(result.applied, result.skipped) for result in results if result.grad_norm is not None]
        return training.full_parameters(made, model), state_of(optimizer), seen


def prepared(made: DeepspeedStrategy) -> tuple[nn.Module, Optimizer, None]:
    model = mixed()
    triple: tuple[nn.Module, Optimizer, None] = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
    return triple


def overflowing(scale: float, **settings: object) -> tuple[bool, bool, bool]:
    """One update with gradients of about ``scale``: applied, skipped, and whether parameters moved."""
    with ds_cases.strategy(Program(), **settings) as made:
        model, optimizer, _ = prepared(made)
        before = training.full_parameters(made, model)
        made.backward(model(tokens(0)).float().square().mean() * scale, model, optimizer)
        result = made.optimizer_step(optimizer, model)
        moved = any(
            not torch.equal(before[name], loader) for name, loader in training.full_parameters(made, model).items()
        )
        return result.applied, result.skipped, moved
