"""`ReplicatedBackend`: every hook for full, plain tensors on every rank; the base class of all backends."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lightrft.config import StrategyConfig
from lightrft.strategy.backend.adamw import adamw
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.modules import replicate
from lightrft.strategy.backend.types import GradientShards, Shard, StateSlice, TrainedModel, WrapOptions
from lightrft.strategy.distributed.world import World
from lightrft.strategy.tensors import cast, elements, grouped, packed

BUCKET_BYTES = 64 * 2**20
"""Bytes of gradients that one collective averages."""


class ReplicatedBackend:
    """Plain data parallelism: each rank has the full model, and gradients are averaged once per update.

    The hooks are documented in `lightrft.strategy.backend.contract`.
    """

    capabilities: frozenset[str] = frozenset({"rank_dependent_modules"})
    accepts_unprepared: ClassVar[bool] = False
    transparent: ClassVar[frozenset[str]] = frozenset()
    fused_step: Callable[[TrainedModel, float], float] | None = None

    def __init__(self, config: StrategyConfig, world: World) -> None:
        self.config, self.world = config, world

    # Lifecycle

    @classmethod
    def join(cls, config: StrategyConfig) -> World:
        return World.join(config)

    def close(self) -> None:
        pass

    # Preparing

    def undo_presharding(self, module: nn.Module) -> None:
        pass

    def check_model(self, module: nn.Module, options: WrapOptions) -> None:
        pass

    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        replicate(module, self.world)
        return module

    def create_optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        """Return unfused ``torch.optim.AdamW``."""
        return adamw(module, **settings)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        pass

    def algorithm(self, optimizer: Optimizer) -> str:
        return type(optimizer).__name__

    def bind(self, trained: TrainedModel) -> None:
        pass

    def forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        """Return autocast to bfloat16 if the setting ``bf16`` is on."""
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    # Step

    def graph_leaves(self, trained: TrainedModel) -> Collection[int]:
        return trained.parameter_ids

    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        loss.backward(retain_graph=retain_graph)

    def reduce(self, trained: TrainedModel) -> None:
        if self.world.size > 1:
            fill_missing_gradients(trained.parameters)  # ranks may have used different modules
            local = [parameter.grad for parameter in trained.parameters if parameter.grad is not None]
            average(local, self.world.device_group, self.world.size)

    def gradient_shards(self, trained: TrainedModel) -> Sequence[GradientShards]:
        return [GradientShards(tensors=[p.grad for p in trained.parameters if p.grad is not None])]

    # Sharding

    def reshard(self, module: nn.Module) -> None:
        pass

    @contextmanager
    def gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        yield [cast(tensor, dtype) for tensor in tensors]

    def full_shape(self, tensor: torch.Tensor) -> torch.Size:
        return tensor.shape

    def shards(self, module: nn.Module) -> list[Shard]:
        return [
            Shard(name=name, shape=parameter.shape, offset=0, values=elements(parameter))
            for name, parameter in module.named_parameters()
        ]

    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        """Return the shards themselves: correct if the optimizer holds the parameters, as tensors or DTensors."""
        parameters = dict(trained.model.named_parameters())
        return [
            StateSlice(shard=shard, key=parameters[shard.name], start=0)
            for shard in self.shards(trained.model)
            if id(parameters[shard.name]) in trained.parameter_ids
        ]

    def sync_from_master(self, module: nn.Module) -> None:
        pass

    def resume_optimizer(self, trained: TrainedModel) -> None:
        pass

    # Offload

    def move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        for state in trained.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    state[key] = value.to(device)

    def move_model(self, module: nn.Module, device: torch.device) -> None:
        module.to(device)


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Zero the missing gradients of trainable parameters, and remove those of parameters that were frozen since.

    An unused parameter gets a zero gradient, so that its moments and weight decay are applied: ZeRO does this by
    construction, and all strategies must behave the same.
    """
    for parameter in parameters:
        if not parameter.requires_grad:
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def average(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup | None, ranks: int) -> None:
    """Replace ``gradients`` by their mean over the ``ranks`` of ``group``, in place.

    Gradients of the same dtype are reduced in buckets. Every rank must pass the same shapes in the same order.
    """
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat, group=group)
        flat /= ranks
        for gradient, values in zip(bucket, flat.split([part.numel() for part in bucket]), strict=True):
            gradient.copy_(values.view(gradient.shape))


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    for same_dtype in grouped((gradient.dtype, gradient) for gradient in gradients).values():
        yield from packed(same_dtype, lambda gradient: gradient.nbytes, BUCKET_BYTES)


if TYPE_CHECKING:
    _checked: type[Backend] = ReplicatedBackend
