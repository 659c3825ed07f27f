"""The output embedding of a language model: which linear layer computes its logits, and what the model does with them.

Models multiply, divide or cap the logits, as their configuration says. `Head` handles these three: it reads the attributes
that transformers models use in forward, so that these changes can be computed outside the model and switched off inside it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from lightrft.config import UnsupportedOperationError


@dataclass(frozen=True, kw_only=True)
class LogitsChange:
    """What a model does with the output of its head, and the attribute that it reads for that."""

    owner: Any
    """The model or its configuration."""
    name: str
    value: float
    off: float | None
    """The value of the attribute with which the model changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A model's output embedding. Its logits are ``factor * soft_cap * tanh(layer(hidden) / soft_cap)``."""

    layers: tuple[nn.Linear, ...]
    """The linear layer; with PEFT's ``modules_to_save``, the original and its copies, of which a forward pass calls one."""
    factor: float = 1.0
    soft_cap: float | None = None
    changes: tuple[LogitsChange, ...] = ()
    """Where the factor and the cap come from."""

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Return the model's logits, from the output of the linear layer."""
        capped = output if self.soft_cap is None else self.soft_cap * torch.tanh(output / self.soft_cap)
        return capped * self.factor

    @contextmanager
    def without_changes(self) -> Iterator[None]:
        """Make the model return the output of its linear layer, within the body."""
        for change in self.changes:
            setattr(change.owner, change.name, change.off)
        try:
            yield
        finally:
            for change in self.changes:
                setattr(change.owner, change.name, change.value)

    @property
    def description(self) -> str:
        """The head and its changes, for messages."""
        return "".join(["its head", *(f", with {change.name}={change.value}" for change in self.changes)])


def find_head(module: nn.Module, class_name: str, call: str, remedy: str) -> Head:
    """Return the head of ``module``, a language model.

    Args:
        module: The model, unwrapped.
        class_name: Name of its class before wrapping.
        call: The public method, for messages.
        remedy: What to do about a model without such a head.

    Raises:
        UnsupportedOperationError: The model names no output embedding, or one that is not a plain linear layer.
    """
    named = getattr(module, "get_output_embeddings", lambda: None)()
    if named is None:
        raise UnsupportedOperationError(
            f"{call}: expected {class_name} to return its LM head from get_output_embeddings(), got none. Define it, as models of "
            f"transformers do. {remedy}"
        )
    layers = _copies(named)
    plain = tuple(layer for layer in layers if _is_plain(layer))
    if len(plain) < len(layers):
        wrong = next(type(layer) for layer in layers if layer not in plain)
        raise UnsupportedOperationError(
            f"{call}: expected the LM head of {class_name} to be a plain nn.Linear, got {wrong.__module__}.{wrong.__name__}. Leave "
            f"the head out of target_modules of adapters and out of quantization. {remedy}"
        )
    factor, soft_cap, changes = 1.0, None, tuple(_changes(module))
    for change in changes:
        if change.name == "final_logit_softcapping":
            soft_cap = change.value
        else:
            factor *= 1 / change.value if change.name == "logits_scaling" else change.value
    return Head(layers=plain, factor=factor, soft_cap=soft_cap, changes=changes)


def _copies(named: nn.Module) -> list[nn.Module]:
    """Return ``named``, or the modules between which PEFT's ``modules_to_save`` chooses in each forward pass."""
    peft: Any = sys.modules.get("peft.utils.other")
    if peft is not None and isinstance(named, peft.ModulesToSaveWrapper):
        wrapper: Any = named
        return [wrapper.original_module, *wrapper.modules_to_save.values()]
    return [named]


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)


def _changes(module: nn.Module) -> Iterator[LogitsChange]:
    """Yield what a model of transformers does with the output of its head.

    https://github.com/huggingface/transformers/blob/v5.19.0/src/transformers/models/gemma2/modeling_gemma2.py (cap),
    .../granite/modeling_granite.py (division) and .../cohere/modeling_cohere.py (multiplication).
    """
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    models = [part for part in module.modules() if hasattr(type(part), "get_output_embeddings")]
    places: list[tuple[Any, str, float | None]] = [
        *((part, "logit_scale", 1.0) for part in models),
        (config, "logits_scaling", 1.0),
        (config, "final_logit_softcapping", None),
    ]
    for owner, name, off in places:
        value = vars(owner).get(name) if hasattr(owner, "__dict__") else None
        if isinstance(value, (int, float)) and value not in (0, off):
            yield LogitsChange(owner=owner, name=name, value=value, off=off)
