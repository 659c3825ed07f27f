"""The caller's optimizers: checking them, and rebinding them to the parameters that exist after wrapping."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import ArgumentTypeError, StrategyError
from lightrft.strategy.backend.types import TrainedModel, parameters_of


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


def check_zero_grad(trained: TrainedModel | None, call: str) -> None:
    """Raise `StrategyError` within an update, whose gradients would be lost."""
    if trained is not None and trained.has_pending_gradient and not trained.updating:
        raise StrategyError(
            f"{call}: expected no call within an update of {trained.class_name}, got one after {trained.backwards} calls of "
            f"backward, whose gradients would be lost. Leave it out: optimizer_step clears the gradients after each update"
        )


def guard(trained: TrainedModel) -> Callable[[], None]:
    """Refuse what a script may do to the optimizer of a model in training, and what backends would take differently.

    ``step`` by hand, ``add_param_group``, and ``zero_grad`` within an update.

    Returns:
        A function that undoes this.
    """
    optimizer, name = trained.optimizer, type(trained.optimizer).__name__
    clear = optimizer.zero_grad

    def check_step(*_: object) -> None:
        if not trained.updating:
            raise StrategyError(
                f"{name}.step: expected {trained.class_name} to be stepped by the strategy, which reduces and clips its "
                f"gradients, got a step by hand. Call strategy.optimizer_step(optimizer, model, scheduler) instead"
            )

    def add_param_group(*_: object) -> None:
        raise StrategyError(
            f"{name}.add_param_group: expected the parameter groups with which {trained.class_name} was prepared, got another. "
            f"Give the optimizer all parameters before prepare, those that train later with a learning rate of 0 until then"
        )

    def zero_grad(*args: Any, **kwargs: Any) -> None:
        check_zero_grad(trained, f"{name}.zero_grad")
        clear(*args, **kwargs)

    handle = optimizer.register_step_pre_hook(check_step)
    vars(optimizer).update(zero_grad=zero_grad, add_param_group=add_param_group)

    def undo() -> None:
        handle.remove()
        for attribute in ("zero_grad", "add_param_group"):
            vars(optimizer).pop(attribute, None)

    return undo


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
