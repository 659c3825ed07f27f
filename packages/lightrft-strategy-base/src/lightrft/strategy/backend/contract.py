"""The hooks of a training backend, in the groups that are overridden together.

`StrategyBase` implements what all backends share: argument checks, counting, scaling, skipping, the order of a step,
checkpoints. A backend implements what differs. It is a separate object, created from the settings and the world.
`ReplicatedBackend` implements every hook for full, replicated, plain tensors; a backend derives from it and overrides
some groups of hooks. Every rank calls every hook, in the same order.

    Lifecycle    join, close                                      process groups, threads, caches
    Preparing    undo_presharding, check_model, wrap,             wrapping models, binding optimizers
                 check_optimizer, bind, ...
    Step         backward, reduce, gradient_shards, fused_step    one update; see `lightrft.strategy.step.update`
    Sharding     gathered, full_shape, shards, state_slices,      weights and optimizer state, sharded and full
                 reshard, sync_from_master, resume_optimizer
    Offload      move_model, move_optimizer                       device memory
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import StrategyConfig
from lightrft.strategy.backend.types import GradientShards, Shard, StateSlice, TrainedModel, WrapOptions
from lightrft.strategy.distributed.world import World


class Lifecycle(Protocol):
    """Construction and close."""

    config: StrategyConfig
    world: World

    @property
    def capabilities(self) -> frozenset[str]:
        """Optional features that this backend supports, such as "rank_dependent_modules"; the conformance suite checks each."""

    @property
    def accepts_unprepared(self) -> bool:
        """Whether a model may be trained without `prepare`: only if wrapping replaces nothing."""

    @classmethod
    def join(cls, config: StrategyConfig) -> World:
        """Set up torch.distributed; return its ranks, device and groups. Called before the backend is created."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        """Create what the backend needs besides the process group; environment variables set here are restored at close."""

    def close(self) -> None:
        """Free what the constructor and the other hooks created. The process groups still exist."""


class Preparing(Protocol):
    """Turning the caller's model and optimizer into the ones that train."""

    def undo_presharding(self, module: nn.Module) -> None:
        """Give ``module`` full parameters, if the library's own tools sharded it while the caller built it.

        Rank 0 gets their values, the other ranks may get meta tensors. Parameters may be replaced. Called first, with
        every model that shares no parameters with a prepared one.
        """

    def check_model(self, module: nn.Module, options: WrapOptions) -> None:
        """Raise if this backend does not support ``module``. An error on one rank is raised on all, before `wrap`."""

    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        """Move ``module`` to the device with rank 0's weights, and shard it if the backend shards.

        Parameters may be replaced, but must keep their names in ``module``. On ranks other than 0, parameters and
        buffers may be on the meta device.

        Returns:
            The module that the caller uses from now on: ``module``, or a wrapper with an attribute ``module``.
        """

    def create_optimizer(self, module: nn.Module, **settings: object) -> Optimizer:
        """Return the optimizer of `StrategyBase.create_optimizer`."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise if the caller's ``optimizer`` would compute other updates on this backend than on full tensors.

        Called before `bind`, and before `wrap` unless the model is already wrapped. An error on one rank is raised on all. See `lightrft.strategy.backend.optimizer_probe`.
        """

    def algorithm(self, optimizer: Optimizer) -> str:
        """Return the name of the optimizer's algorithm; optimizers with the same name can load each other's state."""

    def bind(self, trained: TrainedModel) -> None:
        """Set up the optimizer of ``trained``, which already holds the parameters that `wrap` produced."""

    def forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        """Return the context in which every forward pass of a prepared model runs."""


class Step(Protocol):
    """One update, in the order in which `lightrft.strategy.step.update` calls these hooks.

    A backend with full gradients accumulates them locally in `backward`, and averages them once per update in
    `reduce`. A backend that reduces in each backward pass does nothing in `reduce`, and returns its shards in
    `gradient_shards`. A backend whose library reduces, clips and steps in one call sets `fused_step`.
    """

    @property
    def transparent(self) -> frozenset[str]:
        """Class names of the backend's autograd functions, which the graph of a loss contains."""

    def graph_leaves(self, trained: TrainedModel) -> Collection[int]:
        """Return the ids of the tensors at which the graph of a loss of ``trained`` ends."""

    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        """Add the gradient of ``loss`` to the gradients accumulated so far."""

    def reduce(self, trained: TrainedModel) -> None:
        """Average over the ranks the gradients that `backward` has not reduced yet.

        Called once per update, after its last `backward`, which is not known in advance.
        """

    def gradient_shards(self, trained: TrainedModel) -> Sequence[GradientShards]:
        """Return the reduced gradients; exactly one rank of each group holds each element."""

    @property
    def fused_step(self) -> Callable[[TrainedModel, float], float] | None:
        """Reduce, scale by a factor, clip and step in one call; None to use the separate steps.

        The call returns the norm before clipping, equal on all ranks. If the norm is not finite, it must leave
        parameters and optimizer state unchanged. It always clears the gradients. A factor of NaN, which all ranks then
        pass, means that there is nothing to update from.
        """


class Sharding(Protocol):
    """Weights and optimizer state: full tensors and the ranges that this rank holds."""

    def reshard(self, module: nn.Module) -> None:
        """Shard the parameters of ``module`` again, if a forward pass left them gathered.

        Called before anything reads or moves them.
        """

    def gathered(
        self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None
    ) -> AbstractContextManager[Sequence[torch.Tensor]]:
        """Gather ``tensors``, parameters or buffers of a prepared model, and return them in full.

        Floating-point tensors are cast to ``dtype``, unless it is None. The tensors may be freed when the context exits.
        """

    def full_shape(self, tensor: torch.Tensor) -> torch.Size:
        """Return the shape of ``tensor`` when gathered."""

    def shards(self, module: nn.Module) -> list[Shard]:
        """Return the ranges of the parameters of ``module`` that this rank holds, as views in master precision."""

    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        """Return where the optimizer of ``trained`` keeps the state of the ranges that this rank holds."""

    def sync_from_master(self, module: nn.Module) -> None:
        """Update the parameters of ``module`` after the tensors that `shards` returned were written to."""

    def resume_optimizer(self, trained: TrainedModel) -> None:
        """Update the state that the optimizer keeps outside its state dict, after a checkpoint was loaded."""


class Offload(Protocol):
    """Freeing device memory temporarily."""

    def move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        """Move the optimizer's state to ``device``, except scalars."""

    def move_model(self, module: nn.Module, device: torch.device) -> None:
        """Move parameters, gradients and buffers to ``device``."""


class Backend(Lifecycle, Preparing, Step, Sharding, Offload, Protocol):
    """All hooks of a training backend."""


__all__ = ["Backend", "Lifecycle", "Offload", "Preparing", "Sharding", "Step"]
