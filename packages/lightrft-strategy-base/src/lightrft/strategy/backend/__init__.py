"""What the author of a backend imports: `ReplicatedBackend` to derive from, and what its hooks take and return.

Read `lightrft.strategy.backend.contract` for the hooks, in the groups that are overridden together.
"""

from lightrft.strategy.backend.adamw import adamw, parameter_groups, trainable
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.modules import broadcast, materialize, replicate, tensors_of
from lightrft.strategy.backend.replicated import ReplicatedBackend, average, fill_missing
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
    "average",
    "broadcast",
    "cast",
    "elements",
    "fill_missing",
    "local_rank",
    "materialize",
    "parameter_groups",
    "parameters_of",
    "replicate",
    "tensors_of",
    "trainable",
]
