"""Replicating a module: memory for its meta tensors, and rank 0's weights on every rank."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightrft.config import UnsupportedOperationError
from lightrft.strategy.distributed.world import World
from lightrft.strategy.tensors import as_bytes


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers with their names; tied parameters come once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def attributes_of(parameter: torch.Tensor) -> dict[str, Any]:
    """Return what a caller set on ``parameter``: gradient hooks and attributes. They belong to this object alone."""
    set_by_torch = ("_is_param", "_fsdp_orig_uid")
    attributes = {name: value for name, value in vars(parameter).items() if name not in set_by_torch}
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(parameter, name):
            attributes[name] = getattr(parameter, name)  # the dict itself, through which a handle removes its hook
    return attributes


def set_attributes(parameter: torch.Tensor, attributes: Mapping[str, Any]) -> None:
    """Set what `attributes_of` returned on a parameter that replaces another."""
    for name, value in attributes.items():
        setattr(parameter, name, value)


def check_gradient_hooks(module: nn.Module, backend: str) -> None:
    """Raise `UnsupportedOperationError` for hooks that ``backend``, which shards gradients, would call with a shard."""
    hooked = [name for name, p in module.named_parameters() if p._post_accumulate_grad_hooks]
    if hooked:
        raise UnsupportedOperationError(
            f"prepare: expected no parameter with a hook of register_post_accumulate_grad_hook, got one on "
            f"{', '.join(hooked[:3])} of {type(module).__name__}. {backend} does not accumulate whole gradients on the parameter. Use "
            f"register_hook, or strategy 'fake' or zero_stage=0"
        )


def check_batch_norms(module: nn.Module, backend: str, device: torch.device) -> None:
    """Raise `UnsupportedOperationError` for batch norms on the CPU whose weights ``backend`` stores in bfloat16."""
    norms = [name for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    if norms and device.type == "cpu":
        raise UnsupportedOperationError(
            f"prepare: expected no BatchNorm with bf16=True on the CPU, got {', '.join(norms[:3])} of {type(module).__name__}. "
            f"{backend} keeps their weights in bfloat16, and torch's BatchNorm on the CPU needs them in fp32, as its running statistics. Use bf16=False, "
            f"strategy 'fake' or zero_stage=0, or another norm"
        )


def replace_tensors(
    module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor], tensor_class: type[torch.Tensor]
) -> None:
    """Replace each parameter and buffer of type ``tensor_class`` by the result of ``make``; tied tensors stay tied."""
    made: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for store in (owner._parameters, owner._buffers):
            for name, tensor in store.items():
                if tensor is None or not isinstance(tensor, tensor_class):
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                    if is_parameter:
                        set_attributes(made[id(tensor)], attributes_of(tensor))
                store[name] = made[id(tensor)]  # type: ignore[assignment]


def materialize(module: nn.Module, device: torch.device) -> None:
    """Allocate the meta tensors of ``module`` on ``device``, uninitialised; tied tensors stay tied."""
    replace_tensors(
        module, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor, torch.Tensor
    )


def replicate(module: nn.Module, world: World) -> None:
    """Move ``module`` to the device, with rank 0's parameters and buffers. All ranks must call this."""
    materialize(module, world.device)
    module.to(world.device)
    if world.size > 1:
        for _, tensor in tensors_of(module):
            broadcast(tensor.data, world)


def broadcast(tensor: torch.Tensor, world: World) -> None:
    """Copy rank 0's values of ``tensor``, which is on `World.device`, to every rank, in place."""
    contiguous = tensor.contiguous()
    dist.broadcast(as_bytes(contiguous), src=0, group=world.device_group)
    if contiguous.data_ptr() != tensor.data_ptr():
        tensor.copy_(contiguous)
