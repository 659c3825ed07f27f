"""`FSDPV2Strategy`: parameters, gradients and optimizer state sharded by PyTorch's FSDP2."""

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightrft.config import ConfigError, UnsupportedOperationError
from lightrft.fsdp import sharding
from lightrft.fsdp.wrapping import layers_to_shard
from lightrft.strategy import StrategyBase
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.shards import Shard
from lightrft.strategy.training.gradients import GradientShards
from lightrft.strategy.training.trained_model import TrainedModel

_REDUCE_DTYPES = {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


class FSDPV2Strategy(StrategyBase):
    """FSDP2 over all ranks, or, with ``fsdp_shard_size``, over groups of them that replicate each other (HSDP).

    Gradients are reduced at each backward, so no rank ever holds a whole gradient. With ``bf16`` parameters
    are gathered and used in bf16, gradients reduced in fp32, and the shards are fp32 master weights. FSDP2 gathers a layer
    as one buffer: where a model in training has parameters of several types, frozen ones are fp32 too.
    """

    name = "fsdp"
    transparent = frozenset({"RegisterPostBackwardFunctionBackward"})
    honours = frozenset({"fsdp_shard_size", "fsdp_cpu_offload", "mixed_mm_data", "grad_accum_dtype"})

    # Preparing

    @override
    def _check_model(self, module: nn.Module, options: WrapOptions) -> None:
        _check_shardable(module)
        layers_to_shard(module, mixed_modalities=self.config.mixed_mm_data)

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        layers = layers_to_shard(module, mixed_modalities=self.config.mixed_mm_data)
        _make_contiguous(module)
        if options.training:
            _make_uniform(module)
        whole = dict(module.named_parameters()) if self.world.rank == 0 else {}
        shard: dict[str, Any] = {
            "mesh": self._mesh(options.shard_size if options.shard_size != -1 else self.config.fsdp_shard_size),
            "mp_policy": self._precision(options),
            "offload_policy": self._offload(options),
        }
        for layer in layers:
            fully_shard(layer, reshard_after_forward=options.reshard_after_forward, **shard)
        # The root's parameters are needed at both ends of forward and backward: by default it keeps them between.
        fully_shard(module, reshard_after_forward=None if options.training else options.reshard_after_forward, **shard)
        if any(parameter.is_meta for parameter in module.parameters()):
            module.to_empty(device="cpu" if self.config.fsdp_cpu_offload and options.training else self.world.device)
        sharding.load_from_rank_0(module, whole, self.world)
        self._wrapped.add(module)
        return module

    def _mesh(self, shard_size: int) -> DeviceMesh:
        """The mesh on which ``shard_size`` ranks share a copy of the parameters; -1 means all."""
        ranks = self.world.size
        size = ranks if shard_size == -1 else shard_size
        if size < 1 or ranks % size:
            raise ConfigError(
                f"shard_size={shard_size} does not divide the {ranks} ranks; each copy takes that many of them"
            )
        if size not in self._meshes:
            shape, names = ((ranks,), ("shard",)) if size == ranks else ((ranks // size, size), ("replicate", "shard"))
            self._meshes[size] = init_device_mesh(self.world.device.type, shape, mesh_dim_names=names)
        return self._meshes[size]

    @cached_property
    def _wrapped(self) -> WeakSet[nn.Module]:
        return WeakSet()

    @cached_property
    def _meshes(self) -> dict[int, DeviceMesh]:
        return {}

    def _precision(self, options: WrapOptions) -> MixedPrecisionPolicy:
        reduce_dtype = _REDUCE_DTYPES[self.config.grad_accum_dtype] if options.training else None
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if self.config.bf16 else None, reduce_dtype=reduce_dtype)

    def _offload(self, options: WrapOptions) -> OffloadPolicy:
        if not (self.config.fsdp_cpu_offload and options.training):
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")

    @override
    def _teardown(self) -> None:
        for module in self._wrapped:
            sharding.let_go_of_groups(module)
        self._wrapped.clear()
        self._meshes.clear()
        sharding.forget_meshes()
        gc.collect()  # meshes are cycles, which would keep process groups, their threads and sockets, for a while

    # A step

    @override
    def _leaves(self, trained: TrainedModel) -> Collection[int]:
        return sharding.gathered_parameters(trained.model)

    @contextmanager
    @override
    def _forward_context(self, module: nn.Module, options: WrapOptions) -> Iterator[None]:
        """FSDP2 casts by itself; after a failed forward its state must be put back, or the next one fails too."""
        try:
            yield
        except BaseException:
            _reset(module)
            raise

    @override
    def _backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        try:
            loss.backward(retain_graph=retain_graph)
        except BaseException:
            _reset(trained.model)
            raise

    @override
    def _gradient_shards(self, trained: TrainedModel) -> Sequence[GradientShards]:
        found: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
        for parameter in trained.parameters:
            assert isinstance(parameter, DTensor)
            if parameter.grad is None:  # frozen after it was prepared
                continue
            assert isinstance(parameter.grad, DTensor)
            # Not the gradient's: that may carry the mesh of an earlier lifetime, see sharding.forget_meshes.
            found.setdefault(sharding.shard_group(parameter), []).append(parameter.grad.to_local())
        return [GradientShards(tensors=tensors, group=group) for group, tensors in found.items()]

    # Parameters

    @override
    def _settle(self, module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    @contextmanager
    @override
    def _gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        yield sharding.gather(tensors, dtype, self.world.device)

    @override
    def _shards(self, module: nn.Module) -> list[Shard]:
        return [
            Shard(
                name=name,
                shape=parameter.shape,
                offset=sharding.offset_of(parameter) if isinstance(parameter, DTensor) else 0,
                values=sharding.local(parameter),
            )
            for name, parameter in module.named_parameters()
        ]


def _check_shardable(module: nn.Module) -> None:
    """Raise `UnsupportedOperationError` on parameters that have no dim 0 to split."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UnsupportedOperationError(
            f"FSDP2 splits parameters along dim 0, and {', '.join(scalars[:3])} of {type(module).__name__} have none; "
            f"give them shape (1,)"
        )


def _make_contiguous(module: nn.Module) -> None:
    """Lay parameters out row by row, which is all that FSDP2 takes: others come of channels_last, or of transposing."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def _make_uniform(module: nn.Module) -> None:
    """Make all floating parameters fp32 where they are of several types: FSDP2 gathers a layer as one buffer."""
    floating = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    if len({parameter.dtype for parameter in floating}) > 1:
        for parameter in floating:
            parameter.data = parameter.data.float()


def _reset(module: nn.Module) -> None:
    """Forget a forward or backward that failed half-way."""
    if isinstance(module, FSDPModule) and hasattr(module, "reset_iter_state"):  # torch 2.11 has none
        module.reset_iter_state()
