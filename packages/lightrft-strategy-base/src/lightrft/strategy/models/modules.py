"""Functions on the caller's modules: actor wrappers, copies without weights, the context of a forward pass."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lightrft.config import StrategyError
from lightrft.strategy.backend.modules import tensors_of
from lightrft.strategy.distributed.world import World
from lightrft.strategy.models.registry import inner_model


def check_actor(model: nn.Module) -> None:
    """Raise `StrategyError` if an actor has trainable parameters outside its ``.model``: nothing would train them."""
    inner = {id(parameter) for parameter in inner_model(model).parameters()}
    outside = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in inner
    ]
    if outside:
        raise StrategyError(
            f"prepare: expected every trainable parameter of the actor {type(model).__name__} inside its .model, got others, "
            f"which would never be updated: {', '.join(outside[:3])}. Move them into .model, or freeze them"
        )


def schema_of(module: nn.Module) -> list[list[object]]:
    """Return name, dtype, shape and trainability of every parameter and buffer, which must be the same on all ranks."""
    return [
        [
            name,
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            "trains" if tensor.requires_grad else "frozen",
        ]
        for name, tensor in tensors_of(module)
    ]


def raise_precision(module: nn.Module) -> None:
    """Convert trainable parameters of fewer than 32 bits to fp32, in place: updates accumulate in them."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def meta_copy(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` whose parameters and buffers are on the meta device, tied ones still tied."""
    memo: dict[int, torch.Tensor] = {}
    for _, tensor in tensors_of(module):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def with_buffers_of(meta_model: nn.Module, module: nn.Module) -> nn.Module:
    """Return a copy of ``meta_model`` with the buffers of ``module``, since checkpoints do not hold all buffers."""
    result = copy.deepcopy(meta_model)
    for path, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                result.get_submodule(path)._buffers[name] = buffer.detach().clone()
    return result


def check_materialized(module: nn.Module, world: World) -> None:
    """Raise `StrategyError` if rank 0, which sends its weights to the others, has tensors on the meta device."""
    missing = [name for name, tensor in tensors_of(module) if tensor.is_meta]
    if world.rank == 0 and missing:
        raise StrategyError(
            f"prepare: expected a {type(module).__name__} with values on rank 0, got {len(missing)} tensors on the meta device "
            f"({', '.join(missing[:3])}). Build the model inside strategy.init_model_context(meta_init=True), which gives "
            f"it memory on rank 0"
        )


def around_forward(module: nn.Module, context: Callable[[], AbstractContextManager[object]]) -> Callable[[], None]:
    """Enter ``context()`` around every forward pass of ``module``, its hooks included.

    Replaces the class of this instance by a subclass with another ``__call__``, as FSDP2 does. Forward hooks of torch do
    not suffice: errors of a hook that gathers parameters must pass through the context too.

    Returns:
        A function that undoes this.
    """
    original: type[nn.Module] = type(module)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with context():
            return original.__call__(self, *args, **kwargs)

    body = {"__call__": __call__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    module.__class__ = type(original.__name__, (original,), body)

    def undo() -> None:
        module.__class__ = original

    return undo
