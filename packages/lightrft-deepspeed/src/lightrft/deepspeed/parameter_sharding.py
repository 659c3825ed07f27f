"""Sharding a model over the ranks as ZeRO-3 does, one parameter at a time.

DeepSpeed shards a model that is built under ``zero.Init``, or one that is complete on every rank. Here rank 0 may be the
only one with weights, and no rank ever holds more of them than it did, plus one full parameter.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters, Init
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.utils import is_zero_param
from torch import nn
from torch.distributed import ProcessGroup

from lightrft.config import StrategyError
from lightrft.deepspeed.detach import without_deepspeeds
from lightrft.strategy.backend import World, attributes_of, broadcast, set_attributes


def shard_module(module: nn.Module, world: World, group: ProcessGroup, secondary: ProcessGroup | None) -> None:
    """Move ``module`` to the device with rank 0's values, parameters sharded, buffers replicated. All ranks must call this.

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


def undo_presharding(module: nn.Module, world: World) -> None:
    """Give ``module`` full parameters if it was built under ``deepspeed.zero.Init``. All ranks must call this.

    Rank 0 gets the values, in host memory, the others meta tensors, one parameter at a time.
    """

    def full(parameter: Any) -> Any:
        if not hasattr(parameter, "ds_tensor"):
            return parameter
        with GatheredParameters([parameter]):
            device = "cpu" if world.rank == 0 else "meta"
            values = torch.empty_like(parameter, device=device)
            if world.rank == 0:
                values.copy_(parameter.data)
        replacement = nn.Parameter(values, parameter.requires_grad)
        set_attributes(replacement, without_deepspeeds(attributes_of(parameter)))
        return replacement

    _replace(module, lambda submodule: submodule._parameters, full)


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
    """Return which elements of the flattened full parameter ``rank`` holds; the last ranks may hold fewer, or none."""
    size = parameter.ds_tensor.ds_numel
    return range(min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel))


def note_updates(parameter: Any, updated: set[nn.Parameter]) -> None:
    """Add to ``updated``, on every rank, what ``GatheredParameters(..., modifier_rank=...)`` writes to its shards."""
    partition = parameter.partition

    def noting(param_list: Any = None, *args: Any, has_been_updated: bool = False, **kwargs: Any) -> None:
        partition(param_list, *args, has_been_updated=has_been_updated, **kwargs)
        if has_been_updated:
            updated.update([parameter] if param_list is None else param_list)

    parameter.partition = noting


def gather_in_forward(module: nn.Module) -> Callable[[], None]:
    """Gather a sharded module without an engine during each call. Returns an idempotent function that undoes this."""
    gathered: list[GatheredParameters] = []

    def before(*_: object) -> None:
        gathered.append(GatheredParameters(list(module.parameters())))
        gathered[-1].__enter__()

    def after(*_: object) -> None:
        gathered.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def refuse_state_dict(module: nn.Module) -> None:
    """Make ``state_dict`` of ``module`` and its submodules raise where parameters are not gathered, and so are empty.

    This also holds after the strategy is closed, since the parameters stay sharded. With ``keep_vars`` it returns the
    parameters themselves, and is allowed.
    """
    for part in module.modules():
        part.register_state_dict_pre_hook(_refuse_empty)


def _refuse_empty(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not keep_vars and any(map(_is_empty, module._parameters.values())):
        raise StrategyError(
            f"state_dict: expected a model with all of its weights, got a prepared {type(module).__name__}, whose parameters "
            f"ZeRO-3 has sharded. Save with strategy.save_model or save_ckpt, or read strategy.full_parameters, before the "
            f"strategy is closed"
        )


def _is_empty(parameter: object) -> bool:
    """Whether ZeRO-3 has sharded ``parameter``. After the strategy is closed it has no status, and stays empty."""
    status = getattr(parameter, "ds_status", ZeroParamStatus.NOT_AVAILABLE)
    return is_zero_param(parameter) and status is ZeroParamStatus.NOT_AVAILABLE
