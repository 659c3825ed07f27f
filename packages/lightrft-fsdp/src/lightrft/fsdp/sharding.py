"""Conversion between full tensors and FSDP2's shards: rank 0's weights to every shard, and shards to full tensors.

FSDP2 splits dim 0 into chunks of ceil(rows / ranks), so each shard is a contiguous range of the flattened tensor, and the
ranks along a mesh's shard dimension hold the ranges in order.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightrft.fsdp.gathered_parameter import groups_of_prepared, parameter_groups
from lightrft.strategy.backend import World, all_gather_rows, broadcast, cast


def shard_group(tensor: DTensor) -> dist.ProcessGroup:
    """Return the ranks among which ``tensor`` is split, without the replicas of an HSDP mesh."""
    return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)


def clear_mesh_caches() -> None:
    """Clear torch's caches of meshes, before their process groups end.

    torch caches the results of DTensor operations, mesh included, by the mesh's layout: a later mesh of the same layout
    would get tensors with the old mesh, whose process groups are gone. The caches are per thread; this clears the one in
    which parameters are made.
    """
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    clear_native = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)  # newer than torch 2.11
    if clear_native is not None:
        clear_native()


def release_groups(module: nn.Module) -> None:
    """Remove the process groups, with their threads and sockets, from a model that may outlive them.

    FSDP2 and the meshes of its parameters hold them for as long as the model exists, and have no call that ends that.
    """
    for group in parameter_groups(module):
        for info in filter(None, (group.mesh_info, group.post_forward_mesh_info)):
            for name in vars(info).keys() & {"shard_process_group", "replicate_process_group"}:
                setattr(info, name, None)
            for mesh in (info.mesh, info.mesh._get_root_mesh()):
                getattr(mesh, "_pg_registry", {}).clear()  # newer than torch 2.11


def gathered_parameters(module: nn.Module) -> set[int]:
    """Return the ids of the parameters that FSDP2 gathers for a forward pass: the leaves of the graph of a loss."""
    parameters = (parameter for group in groups_of_prepared(module) for parameter in group.fsdp_params)
    return {id(parameter._unsharded_param) for parameter in parameters if hasattr(parameter, "_unsharded_param")}


def offset_of(tensor: DTensor) -> int:
    """Return the index of the first element of this rank's shard in the flattened full tensor."""
    _, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return starts[0] * tensor.shape[1:].numel()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part as a 1-D view."""
    part = tensor.detach()
    return (part.to_local() if isinstance(part, DTensor) else part).view(-1)


@torch.no_grad()
def load_from_rank_0(module: nn.Module, full_tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Fill the shards of ``module`` and its buffers with rank 0's values, one tensor at a time.

    Args:
        module: The sharded module.
        full_tensors: On rank 0, the full tensors by name; not read on other ranks.
        world: The ranks.
    """
    for name, parameter in module.named_parameters():
        full = _on_device(full_tensors[name], world) if world.rank == 0 else _empty(parameter, world)
        if world.size > 1:
            broadcast(full, world)
        values, start = local(parameter), offset_of(parameter) if isinstance(parameter, DTensor) else 0
        values.copy_(full.view(-1)[start : start + values.numel()])
    if world.size > 1:
        for _, buffer in module.named_buffers():
            broadcast(buffer.data, world)


def _on_device(tensor: torch.Tensor, world: World) -> torch.Tensor:
    return tensor.detach().to(world.device).contiguous()


def _empty(parameter: nn.Parameter, world: World) -> torch.Tensor:
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)


def gather(tensors: Sequence[torch.Tensor], dtype: torch.dtype | None, device: torch.device) -> list[torch.Tensor]:
    """Return full tensors on ``device``, floating ones in ``dtype``; one collective for each shard group and type."""
    gathered: dict[int, torch.Tensor] = {}
    frames: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            sent = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            frames.setdefault((id(shard_group(tensor)), sent), []).append(index)
        else:
            gathered[index] = cast(tensor, dtype)
    for (_, sent), indices in frames.items():
        sharded = [tensor for index in indices if isinstance(tensor := tensors[index], DTensor)]
        gathered.update(zip(indices, _gather_frame(sharded, sent, device), strict=True))
    return [gathered[index] for index in range(len(tensors))]


def shard_like(full: torch.Tensor, like: DTensor) -> DTensor:
    """Return ``full``, which all ranks have, as a DTensor with the shards of ``like``."""
    part, start = like.to_local(), offset_of(like)
    values = full.reshape(-1)[start : start + part.numel()].view(part.shape).to(part.device)
    return DTensor.from_local(
        values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _gather_frame(shards: Sequence[DTensor], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    group = shard_group(shards[0])
    ranks = dist.get_world_size(group)
    chunks = [-(-shard.shape[0] // ranks) * shard.shape[1:].numel() for shard in shards]
    rows = torch.zeros(ranks, sum(chunks), dtype=dtype, device=device)
    this_rank = rows[dist.get_rank(group)]
    starts = [sum(chunks[:index]) for index in range(len(chunks))]
    for shard, start in zip(shards, starts, strict=True):
        values = local(shard)
        this_rank[start : start + values.numel()].copy_(values)  # casts
    all_gather_rows(rows, group)
    return [
        rows[:, start : start + chunk].reshape(-1)[: shard.shape.numel()].view(shard.shape)
        for shard, start, chunk in zip(shards, starts, chunks, strict=True)
    ]
