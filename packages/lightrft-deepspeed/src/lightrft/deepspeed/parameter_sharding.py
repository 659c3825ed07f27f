"""Sharding a model over the ranks as ZeRO-3 does, one parameter at a time.

DeepSpeed shards a model that is built under ``zero.Init``, or one that is whole on every rank. Here rank 0 may be the
only one with weights, and no rank ever holds more of them than it did, plus one whole parameter.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters, Init
from torch import nn
from torch.distributed import ProcessGroup

from lightrft.strategy.backend import World, broadcast


def shard_module(module: nn.Module, world: World, group: ProcessGroup, secondary: ProcessGroup | None) -> None:
    """Move ``module`` to the device with rank 0's values, parameters sharded, buffers whole. All ranks must call this.

    Args:
        module: The model. Parameters on the meta device are replaced.
        world: The ranks.
        group: The ranks that share one copy of the parameters.
        secondary: The ranks of the ZeRO++ secondary partition.
    """
    # With a module, it also installs the linear that frees gathered weights between forward and backward.
    init = Init(module=nn.Module(), data_parallel_group=group, zero_param_parallel_group=secondary)

    def sharded(parameter: nn.Parameter) -> nn.Parameter:
        parameter = _on_device(parameter, world)
        init._convert_to_deepspeed_param(parameter)
        broadcast(parameter.data, world)
        parameter.partition()  # type: ignore[attr-defined]  # DeepSpeed's, from here on
        return parameter

    def replicated(buffer: torch.Tensor) -> torch.Tensor:
        buffer = _on_device(buffer, world)
        broadcast(buffer.data, world)
        return buffer

    _replace(module, lambda submodule: submodule._parameters, sharded)
    _replace(module, lambda submodule: submodule._buffers, replicated)


def _on_device(tensor: Any, world: World) -> Any:
    if tensor.is_meta:
        empty = torch.empty_like(tensor, device=world.device)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    tensor.data = tensor.data.to(world.device)
    return tensor


def _replace(module: nn.Module, store_of: Callable[[nn.Module], dict[str, Any]], change: Callable[[Any], Any]) -> None:
    """Put ``change(tensor)`` in place of each tensor; tied ones are changed once and stay tied."""
    changed: dict[int, tuple[Any, Any]] = {}  # holds the old tensors too, so that no id is used twice
    for submodule in module.modules():
        store = store_of(submodule)
        for name, tensor in store.items():
            if tensor is not None:
                if id(tensor) not in changed:
                    changed[id(tensor)] = tensor, change(tensor)
                store[name] = changed[id(tensor)][1]


def owned_range(parameter: Any, rank: int) -> range:
    """Return which elements of the flattened whole parameter ``rank`` holds; the last ranks may hold fewer, or none."""
    size = parameter.ds_tensor.ds_numel
    return range(min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel))


def gather_in_forward(module: nn.Module) -> Callable[[], None]:
    """Gather a sharded module without an engine for the time of each call. Returns what undoes this, also twice."""
    gathered: list[GatheredParameters] = []

    def before(*_: Any) -> None:
        gathered.append(GatheredParameters(list(module.parameters())))
        gathered[-1].__enter__()

    def after(*_: Any) -> None:
        gathered.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop
