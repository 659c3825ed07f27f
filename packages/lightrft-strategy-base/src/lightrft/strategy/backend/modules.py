"""Replicating a module: memory for its meta tensors, and rank 0's weights on every rank."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from lightrft.strategy.distributed.world import World
from lightrft.strategy.tensors import as_bytes


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers with their names; tied parameters come once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def replace_tensors(module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor], kind: type[torch.Tensor]) -> None:
    """Replace each parameter and buffer of type ``kind`` by the result of ``make``; tied tensors stay tied."""
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
    dist.broadcast(as_bytes(contiguous), src=0, group=world.payload)
    if contiguous.data_ptr() != tensor.data_ptr():
        tensor.copy_(contiguous)
