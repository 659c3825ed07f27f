"""Working on modules: actors' wrappers, copies without weights, rank 0's weights on every rank."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import StrategyError
from lightrft.strategy.distributed.world import World
from lightrft.strategy.flat import as_bytes


def is_actor(model: object) -> bool:
    """Whether ``model`` is marked as an actor, as LightRFT marks them."""
    return bool(getattr(model, "is_actor", False))


def inner_model(model: nn.Module) -> nn.Module:
    """The model that an actor wraps as ``.model``, or ``model`` itself where it is no such wrapper.

    A Hugging Face model has a ``.model`` of its own, its backbone, and is no wrapper.
    """
    if not is_actor(model) or hasattr(type(model), "from_pretrained"):
        return model
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else model


def check_actor(model: nn.Module) -> None:
    """Raise `StrategyError` where an actor has trainable parameters beside its ``.model``: nothing would train them."""
    inner = {id(parameter) for parameter in inner_model(model).parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inner]
    if outside:
        raise StrategyError(
            f"prepare: the actor {type(model).__name__} has trainable parameters outside its .model, which would never "
            f"be updated: {', '.join(outside[:3])}. Move them into .model, or freeze them"
        )


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, tied ones once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def schema_of(module: nn.Module) -> list[list[object]]:
    """Name, type, shape and whether it trains, of every parameter and buffer: what must be alike on all ranks."""
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
    """Make trainable parameters of fewer than 32 bits fp32, in place: updates accumulate in these."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters and buffers are on the meta device, tied ones still tied."""
    memo: dict[int, Any] = {}
    for _, tensor in tensors_of(module):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def skeleton_with_buffers(empty: nn.Module, module: nn.Module) -> nn.Module:
    """A copy of the skeleton ``empty`` with the buffers of ``module``: not all of them are in a checkpoint."""
    result = copy.deepcopy(empty)
    for path, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                result.get_submodule(path)._buffers[name] = buffer.detach().clone()
    return result


def replace_tensors(module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor], kind: type[torch.Tensor]) -> None:
    """Replace each parameter and buffer of ``module`` that is a ``kind`` by what ``make`` gives; ties stay."""
    made: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for store in (owner._parameters, owner._buffers):
            for name, tensor in store.items():
                if tensor is None or not isinstance(tensor, kind):
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                store[name] = made[id(tensor)]  # type: ignore[assignment]


def materialize(module: nn.Module, device: torch.device) -> None:
    """Put uninitialised memory on ``device`` under whatever of ``module`` is on the meta device; ties stay."""
    replace_tensors(
        module, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor, torch.Tensor
    )


def check_materialized(module: nn.Module, world: World) -> None:
    """Raise `StrategyError` where rank 0 has no weights to give."""
    missing = [name for name, tensor in tensors_of(module) if tensor.is_meta]
    if world.rank == 0 and missing:
        raise StrategyError(
            f"prepare: on rank 0, {len(missing)} tensors of {type(module).__name__} are on the meta device and have no "
            f"values ({', '.join(missing[:3])}); build the model inside strategy.init_model_context(meta_init=True), "
            f"which builds it for real on rank 0"
        )


def replicate(module: nn.Module, world: World) -> None:
    """Move ``module`` to the device, whole, with rank 0's parameters and buffers. Every rank calls it."""
    materialize(module, world.device)
    module.to(world.device)
    if world.size > 1:
        for _, tensor in tensors_of(module):
            broadcast(tensor.data, world)


def broadcast(tensor: torch.Tensor, world: World) -> None:
    """Give ``tensor``, on `World.device`, rank 0's values on every rank."""
    whole = tensor.contiguous()
    dist.broadcast(as_bytes(whole), src=0, group=world.payload)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)


def guard_forward(module: nn.Module, around: Callable[[], AbstractContextManager[object]]) -> Callable[[], None]:
    """Enter ``around()`` at every call of ``module``; returns what undoes this.

    The class of this one instance is replaced by a subclass with another ``__call__``: hooks that gather
    parameters run inside it, and a context around ``forward`` alone would not cover them.
    """
    original: type[nn.Module] = type(module)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with around():
            return original.__call__(self, *args, **kwargs)

    body = {"__call__": __call__, "__module__": original.__module__, "__qualname__": original.__qualname__}
    module.__class__ = type(original.__name__, (original,), body)

    def undo() -> None:
        module.__class__ = original

    return undo
