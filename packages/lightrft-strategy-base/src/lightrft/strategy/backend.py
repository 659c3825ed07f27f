"""What a training backend does its own way: the hooks, and their plain-torch defaults.

A strategy is a class below `StrategyBase`, which is a `Backend`: the public methods own the contract (guards,
counting, scaling, skipping, the order of a step) and call these hooks; a backend overrides the few that it
does otherwise. The defaults are those of a model whose parameters are plain tensors, whole on every rank, and
whose gradients are, after `_backward`, the mean over the ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import StrategyConfig
from lightrft.strategy import flat
from lightrft.strategy.distributed.world import World
from lightrft.strategy.shards import Shard, StateSlice
from lightrft.strategy.training import gradients
from lightrft.strategy.training.gradients import GradientShards
from lightrft.strategy.training.optimizers import adamw

if TYPE_CHECKING:
    from lightrft.strategy.training.trained_model import TrainedModel


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """``tensor``, detached, in ``dtype`` where it is floating and a type is given."""
    return tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()


@dataclass(frozen=True, kw_only=True)
class WrapOptions:
    """How a model is to be prepared."""

    training: bool
    shard_size: int = -1
    """Ranks over which parameters are sharded, the rest being replicas; -1 means all."""
    reshard_after_forward: bool = True
    """Give gathered parameters back after forward, and gather them again for backward."""


class Backend(ABC):
    """The hooks of a training backend. Every rank calls them in the same order."""

    name: ClassVar[str]
    """The name under which the strategy is registered."""
    honours: ClassVar[frozenset[str]] = frozenset()
    """The optional settings that this strategy does something with; see `lightrft.strategy.settings_check`."""
    capabilities: frozenset[str] = frozenset()
    """What this strategy can do beyond the contract; see `lightrft.strategy.capabilities`."""
    adopts: ClassVar[bool] = False
    """Whether a bare model and optimizer may be used without `prepare`: only where nothing is replaced."""
    transparent: ClassVar[frozenset[str]] = frozenset()
    """Names of the backend's own autograd functions that stand in the graph between a loss and the parameters."""

    config: StrategyConfig
    world: World

    # Lifecycle

    def _join(self) -> World:
        """The world to train in."""
        return World.join(self.config)

    def _setup(self) -> None:
        """Make what the backend needs beside the process group. What it sets in the environment is undone."""

    def _teardown(self) -> None:
        """Give back what `_setup` and preparing models made. The process groups still exist."""

    # Preparing

    def _check_model(self, module: nn.Module, options: WrapOptions) -> None:
        """Raise where this backend cannot take ``module``. What one rank raises, all do; `_wrap` is called after it."""

    @abstractmethod
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        """Make ``module`` ready: on the device, with rank 0's weights, sharded if the backend shards.

        Returns what the caller calls from now on: ``module``, or a wrapper of it whose ``module`` it is.
        Parameters may be replaced; their names inside ``module`` stay. On ranks other than 0 parameters and
        buffers may be on the meta device.
        """

    def _create_optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        """The optimizer of `create_optimizer`. Default: unfused ``torch.optim.AdamW``."""
        return adamw(module, **settings)

    def _algorithm(self, optimizer: Optimizer) -> str:
        """What ``optimizer`` computes, however it does: those of one name go on from each other's state."""
        return type(optimizer).__name__

    def _bind(self, trained: "TrainedModel") -> None:
        """The optimizer of ``trained`` is known now, and holds the parameters as `_wrap` left them."""

    def _forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        """Entered around every forward of a prepared model. Default: with ``bf16``, autocast to bfloat16."""
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    # A step

    def _leaves(self, trained: "TrainedModel") -> Collection[int]:
        """The tensors, by their ``id``, at which the graph of a loss of ``trained`` ends: its trainable parameters."""
        return trained.identities

    def _backward(self, trained: "TrainedModel", loss: torch.Tensor, retain_graph: bool) -> None:
        """Add the gradient of ``loss``, averaged over the ranks now or in `_update`, to what is there."""
        loss.backward(retain_graph=retain_graph)

    def _gradient_shards(self, trained: "TrainedModel") -> Sequence[GradientShards]:
        """The gradients of the trainable parameters, every element held by exactly one rank of its group."""
        return [GradientShards(tensors=[p.grad for p in trained.parameters if p.grad is not None])]

    def _update(self, trained: "TrainedModel", factor: float) -> float:
        """Finish the gradient, multiply it by ``factor``, clip it, and step the optimizer; clear the gradient.

        Returns the norm before clipping, equal on all ranks. Where it is not finite nothing but the gradient
        has changed.
        """
        gradients.require_some(trained.parameters, trained.kind)
        gradients.fill_missing(trained.parameters)
        shards = self._gradient_shards(trained)
        norm = gradients.global_norm(shards).item() * factor
        if math.isfinite(norm):
            gradients.scale(shards, factor * gradients.clip_factor(norm, self.config.max_norm))
            trained.optimizer.step()
        for parameter in trained.parameters:
            parameter.grad = None
        return norm

    # Parameters, at rest and whole

    def _settle(self, module: nn.Module) -> None:
        """Bring the parameters of ``module``, a prepared model, to the form in which they rest between steps.

        Called before anything reads or moves them; the last forward may have left them gathered.
        """

    @contextmanager
    def _gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        """The whole tensors of which ``tensors``, parameters or buffers of a prepared model, may be shards.

        Floating ones are cast to ``dtype`` where one is given. They may be gone after the body.
        """
        yield [cast(tensor, dtype) for tensor in tensors]

    def _full_shape(self, tensor: torch.Tensor) -> torch.Size:
        """The shape of the whole tensor of which ``tensor`` may be a shard."""
        return tensor.shape

    def _shards(self, module: nn.Module) -> list[Shard]:
        """The parameters of ``module``, a prepared model, that this rank holds: views, in their master precision."""
        return [
            Shard(name=name, shape=parameter.shape, offset=0, values=flat.elements(parameter))
            for name, parameter in module.named_parameters()
        ]

    def _state_slices(self, trained: "TrainedModel") -> list[StateSlice]:
        """Where the optimizer of ``trained`` keeps the state of the ranges that this rank holds.

        The default is right wherever the optimizer knows the parameters themselves, whole or sharded (DTensor).
        """
        parameters, own = dict(trained.model.named_parameters()), {id(parameter) for parameter in trained.parameters}
        return [
            StateSlice(shard=shard, key=parameters[shard.name], start=0)
            for shard in self._shards(trained.model)
            if id(parameters[shard.name]) in own
        ]

    def _refresh(self, module: nn.Module) -> None:
        """Make the parameters of ``module`` what its shards are, after these were written to. Every rank calls it."""

    def _resume_optimizer(self, trained: "TrainedModel") -> None:
        """Go on from the optimizer's state, which was loaded: for what the optimizer keeps elsewhere."""

    # Memory

    def _move_optimizer(self, trained: "TrainedModel", device: torch.device) -> None:
        """Move the optimizer's state; scalars stay where they are."""
        for state in trained.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    state[key] = value.to(device)

    def _move_model(self, module: nn.Module, device: torch.device) -> None:
        """Move parameters, gradients and buffers."""
        module.to(device)
