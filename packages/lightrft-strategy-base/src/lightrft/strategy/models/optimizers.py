"""The caller's optimizers: checking them, and rebinding them to the parameters that exist after wrapping."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import ArgumentTypeError, StrategyError
from lightrft.strategy.backend.types import parameters_of


def check_kinds(call: str, model: object, *optimizers: object) -> None:
    """Raise `ArgumentTypeError` unless ``model`` is a module and the others are optimizers."""
    arguments = [(model, nn.Module, "model"), *((optimizer, Optimizer, "optimizer") for optimizer in optimizers)]
    for value, expected, argument in arguments:
        if not isinstance(value, expected):
            swapped = ". Model and optimizer are swapped" if isinstance(value, (nn.Module, Optimizer)) else ""
            raise ArgumentTypeError(
                f"{call}: expected the {argument} to be a torch {expected.__name__}, got {type(value).__name__}{swapped}"
            )


def check_steps(optimizer: Optimizer, call: str) -> None:
    """Raise `StrategyError` for an optimizer whose step needs more than the gradient."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise StrategyError(
            f"{call}: expected an optimizer that steps from the gradient alone, got LBFGS, which evaluates the loss again. "
            f"Use another optimizer"
        )


def check_belongs(optimizer: Optimizer, module: nn.Module, call: str) -> None:
    """Raise `StrategyError` unless ``optimizer`` has parameters, all of them of ``module``."""
    known = {id(parameter) for parameter in module.parameters()}
    parameters = list(parameters_of(optimizer))
    foreign = sum(id(parameter) not in known for parameter in parameters)
    if foreign or not parameters:
        mismatch = (
            f"{foreign} of its {len(parameters)} parameters are not in it" if parameters else "it has no parameters"
        )
        raise StrategyError(
            f"{call}: expected an optimizer of the model ({type(module).__name__}), got a {type(optimizer).__name__}: "
            f"{mismatch}. Create it with create_optimizer(model), for the same model"
        )


def rebind(optimizer: Optimizer, names: Mapping[int, str], module: nn.Module) -> None:
    """Replace the parameters of ``optimizer`` by those that wrapping put in their place.

    Groups, their order and their hyperparameters stay unchanged.

    Args:
        optimizer: Made before ``module`` was wrapped.
        names: The name of each parameter before wrapping, by its ``id``.
        module: The wrapped model.

    Raises:
        StrategyError: Parameters were replaced, and the optimizer has state of the old ones.
    """
    current = dict(module.named_parameters())
    replaced = [p for p in parameters_of(optimizer) if current.get(names[id(p)]) is not p]
    if not replaced:
        return
    if optimizer.state:
        raise StrategyError(
            "prepare: expected an optimizer without state, since wrapping replaces this model's parameters, got one that has "
            "stepped already. Prepare before the first step, and load a checkpoint afterwards"
        )
    for group in optimizer.param_groups:
        group["params"] = [current[names[id(parameter)]] for parameter in group["params"]]
