"""The patch of torch for FSDP2, and the internals of FSDP2 that we override or use.

`require_fsdp` checks the internals when a backend is made, so that a name that torch drops is an error there.
"""

import functools
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor

from lightrft.fsdp import sharding
from lightrft.strategy.patching import Patch, Target, around, require


def _on_whole_matrix(orthogonalize: Callable[..., torch.Tensor], matrix: torch.Tensor, *args: object) -> torch.Tensor:
    if not isinstance(matrix, DTensor):
        return orthogonalize(matrix, *args)
    (full,) = sharding.gather([matrix], None, torch.device(matrix.device_mesh.device_type))
    return sharding.shard_like(orthogonalize(full, *args), matrix)


MUON = Patch(
    target="torch.optim._muon:_zeropower_via_newtonschulz",
    parameters=("grad",),
    replacement=around(_on_whole_matrix),
    why="on shards, Muon's Newton-Schulz iteration rounds partial norms and products to bfloat16, which it then amplifies: "
    "the update depends on the number of ranks. Each rank orthogonalizes the whole matrix instead, one at a time",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/_muon.py#L31-L75",
    versions="2.11 to 2.13",
    until="Muon gathers sharded matrices",
)
"""Applied where its target exists. Without it, the probe of `FSDPBackend.check_optimizer` refuses Muon on several ranks."""


def _internals(owner: str, *names: str) -> list[Target]:
    return [Target(target=f"{owner}.{name}") for name in names]


USED = [
    *_internals(
        "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam",
        "to_sharded", "to_unsharded",
        "_module_info", "_param_fqn", "_unsharded_param", "orig_dtype", "reduce_dtype", "sharded_param",
    ),
    Target(
        target="torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.pre_forward",
        parameters=("module", "args", "kwargs"),
    ),
    *_internals(
        "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup",
        "_init_mp_dtypes", "_orig_dtype", "_reduce_dtype", "_to_sharded", "_to_sharded_post_forward", "_to_unsharded",
        "fsdp_params", "is_unsharded", "mesh_info", "post_backward", "post_forward_mesh_info", "wait_for_unshard",
    ),
    *_internals("torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState", "_fsdp_param_group", "_lazy_init", "_state_ctx"),
    *_internals("torch.distributed.fsdp._fully_shard._fsdp_state:FSDPStateContext", "all_states"),
    Target(target="torch.distributed.fsdp:FSDPModule._get_fsdp_state"),
    Target(target="torch.distributed.tensor:DTensor._op_dispatcher"),
    Target(target="torch.distributed.tensor._sharding_prop:ShardingPropagator.propagate_op_sharding"),
]  # fmt: skip


@functools.cache
def require_fsdp() -> None:
    """Check, once in a process, that the installed torch has all internals of FSDP2 that we override or use.

    Raises:
        StrategyError: Names the version, what it lacks and the remedy.
    """
    require("strategy 'fsdp'", "torch", ">=2.11", USED)
