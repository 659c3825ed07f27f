"""The patch of torch for FSDP2."""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lightrft.fsdp import sharding
from lightrft.strategy.patching import Patch, around


def _on_whole_matrix(orthogonalize: Callable[..., torch.Tensor], matrix: torch.Tensor, *args: Any) -> torch.Tensor:
    if not isinstance(matrix, DTensor):
        return orthogonalize(matrix, *args)
    (whole,) = sharding.gather([matrix], None, torch.device(matrix.device_mesh.device_type))
    return sharding.shard_like(orthogonalize(whole, *args), matrix)


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
