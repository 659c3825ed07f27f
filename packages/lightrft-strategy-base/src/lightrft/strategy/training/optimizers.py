"""Optimizers: which parameters decay, and following a parameter through wrapping."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import ArgumentTypeError, StrategyError

_NORM_NAME = re.compile(r"(^|_)(norm|ln|layernorm|rmsnorm|batchnorm|groupnorm)\d*(_\w+)?$", re.IGNORECASE)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get gradients, by name, tied ones once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def spared_from_decay(module: nn.Module) -> set[str]:
    """Names of the biases and of the parameters of norms, which weight decay spares.

    A norm is a module whose class, or whose own name, says so: ``LlamaRMSNorm``, ``ln_f``, ``input_layernorm``.
    """
    spared = set()
    for path, owner in module.named_modules():
        is_norm = "norm" in type(owner).__name__.lower() or _NORM_NAME.search(path.rpartition(".")[2])
        for name, _ in owner.named_parameters(recurse=False):
            if name.endswith("bias") or is_norm:
                spared.add(f"{path}.{name}" if path else name)
    return spared


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in at most two groups: with weight decay, and without."""
    spared = spared_from_decay(module)
    decaying = [parameter for name, parameter in trainable(module).items() if name not in spared]
    others = [parameter for name, parameter in trainable(module).items() if name in spared]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter of every group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def check_kinds(call: str, model: object, *optimizers: object) -> None:
    """Raise `ArgumentTypeError` unless ``model`` is a module, and what follows an optimizer."""
    wanted = [(model, nn.Module, "model"), *((it, Optimizer, "optimizer") for it in optimizers)]
    for value, kind, what in wanted:
        if not isinstance(value, kind):
            swapped = "; model and optimizer are swapped" if isinstance(value, (nn.Module, Optimizer)) else ""
            raise ArgumentTypeError(
                f"{call}: the {what} is a {type(value).__name__}; wanted a torch {kind.__name__}{swapped}"
            )


def check_steps(optimizer: Optimizer, call: str) -> None:
    """Raise `StrategyError` for an optimizer whose step needs more than the gradient."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise StrategyError(
            f"{call}: LBFGS evaluates the loss again at each step, which no update here can; use another"
        )


def check_belongs(optimizer: Optimizer, module: nn.Module, call: str) -> None:
    """Raise `StrategyError` unless ``optimizer`` holds parameters of ``module`` and no others."""
    known = {id(parameter) for parameter in module.parameters()}
    own = list(parameters_of(optimizer))
    strange = sum(id(parameter) not in known for parameter in own)
    if strange or not own:
        found = f"{strange} of its {len(own)} parameters are not in it" if own else "it has no parameters"
        raise StrategyError(
            f"{call}: the optimizer ({type(optimizer).__name__}) does not belong to the model "
            f"({type(module).__name__}): {found}. Make it with create_optimizer(model), from the same model"
        )


def rebind(optimizer: Optimizer, names: Mapping[int, str], module: nn.Module) -> None:
    """Point ``optimizer`` at the parameters that replaced its own when ``module`` was wrapped.

    ``names``: the name that each parameter had before, by its ``id``. Groups, their order and their
    hyperparameters stay as they are.
    """
    current = dict(module.named_parameters())
    replaced = [p for p in parameters_of(optimizer) if current.get(names[id(p)]) is not p]
    if not replaced:
        return
    if optimizer.state:
        raise StrategyError(
            "prepare: wrapping replaces this model's parameters, and the optimizer already has state for the old "
            "ones; prepare before the first step, and load a checkpoint afterwards"
        )
    for group in optimizer.param_groups:
        group["params"] = [current[names[id(parameter)]] for parameter in group["params"]]


def adamw(module: nn.Module, *, weight_decay: float = 0.0, **settings: Any) -> Optimizer:
    """``torch.optim.AdamW`` over the groups of `parameter_groups`; ``settings`` are its own."""
    groups = parameter_groups(module, weight_decay)
    if not groups:
        raise StrategyError(f"create_optimizer: the model ({type(module).__name__}) has no trainable parameters")
    return torch.optim.AdamW(groups, **settings)
