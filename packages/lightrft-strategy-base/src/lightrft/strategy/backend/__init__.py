"""The API for authors of backends: `ReplicatedBackend` to derive from, and the types that its hooks take and return.

Read `lightrft.strategy.backend.contract` for the hooks, in the groups that are overridden together.
"""

from lightrft.strategy.backend.adamw import adamw, parameter_groups, trainable
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.modules import (
    attributes_of,
    broadcast,
    check_batch_norms,
    check_gradient_hooks,
    materialize,
    replicate,
    set_attributes,
    tensors_of,
)
from lightrft.strategy.backend.optimizer_probe import check_elementwise
from lightrft.strategy.backend.replicated import ReplicatedBackend, average, fill_missing_gradients
from lightrft.strategy.backend.types import GradientShards, Shard, StateSlice, TrainedModel, WrapOptions, parameters_of
from lightrft.strategy.distributed.world import World, all_gather_rows, local_rank
from lightrft.strategy.tensors import cast, elements

__all__ = [
    "Backend",
    "GradientShards",
    "ReplicatedBackend",
    "Shard",
    "StateSlice",
    "TrainedModel",
    "World",
    "WrapOptions",
    "adamw",
    "all_gather_rows",
    "attributes_of",
    "average",
    "broadcast",
    "cast",
    "check_batch_norms",
    "check_elementwise",
    "check_gradient_hooks",
    "elements",
    "fill_missing_gradients",
    "local_rank",
    "materialize",
    "parameter_groups",
    "parameters_of",
    "replicate",
    "set_attributes",
    "tensors_of",
    "trainable",
]
