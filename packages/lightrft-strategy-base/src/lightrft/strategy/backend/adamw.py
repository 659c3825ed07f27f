"""The optimizer of `create_optimizer`: AdamW without weight decay for biases and norms."""

import re
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import StrategyError

_NORM_CLASS = re.compile(r"Norm(?![a-z])|(?i:layer|rms|batch|group|instance)_?norm")
_NORM_NAME = re.compile(r"(^|_)(norm|ln|layernorm|rmsnorm|batchnorm|groupnorm)\d*(_\w+)?$", re.IGNORECASE)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; tied parameters come once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def names_without_decay(module: nn.Module) -> set[str]:
    """Return the names of biases and of the parameters of norms, which have no weight decay.

    A norm is recognised by the class of a module without children, or by its name: ``LlamaRMSNorm``, ``ln_f``,
    ``input_layernorm``.
    """
    without_decay = set()
    for path, owner in module.named_modules():
        is_norm = _is_norm(owner) or _NORM_NAME.search(path.rpartition(".")[2])
        for name, _ in owner.named_parameters(recurse=False):
            if name.endswith("bias") or is_norm:
                without_decay.add(f"{path}.{name}" if path else name)
    return without_decay


def _is_norm(module: nn.Module) -> bool:
    return _NORM_CLASS.search(type(module).__name__) is not None and not any(module.children())


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in at most two groups: with weight decay, and without."""
    without_decay = names_without_decay(module)
    decaying = [parameter for name, parameter in trainable(module).items() if name not in without_decay]
    others = [parameter for name, parameter in trainable(module).items() if name in without_decay]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, *, weight_decay: float = 0.0, **settings: Any) -> Optimizer:
    """Return ``torch.optim.AdamW`` over `parameter_groups`; ``settings`` are its keyword arguments."""
    groups = parameter_groups(module, weight_decay)
    if not groups:
        raise StrategyError(
            f"create_optimizer: expected a model with trainable parameters, got {type(module).__name__}, which has no "
            f"trainable parameters. Set requires_grad on those to train"
        )
    return torch.optim.AdamW(groups, **settings)
