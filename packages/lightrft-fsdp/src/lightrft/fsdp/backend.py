"""`FSDPBackend`: parameters, gradients and optimizer state sharded by PyTorch's FSDP2."""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Sharded
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.config import ConfigError, StrategyConfig, StrategyError, UnsupportedOperationError
from lightrft.fsdp import patches, sharding
from lightrft.fsdp.gathered_parameter import gather_for_parts, keep_changes, stop_gathering_for_parts
from lightrft.fsdp.wrapping import layers_to_shard
from lightrft.strategy.backend import (
    GradientShards,
    ReplicatedBackend,
    Shard,
    TrainedModel,
    World,
    WrapOptions,
    attributes_of,
    check_batch_norms,
    check_elementwise,
    check_gradient_hooks,
    set_attributes,
)

_REDUCE_DTYPES = {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


class FSDPBackend(ReplicatedBackend):
    """FSDP2 over all ranks or, with ``fsdp_shard_size``, over groups of ranks that replicate each other (HSDP).

    Gradients are reduced in each backward pass, so no rank ever holds a full gradient. With ``bf16``, parameters are
    gathered and used in bf16, gradients are reduced in fp32, and the shards are fp32 master weights. FSDP2 gathers a layer
    as one buffer: if a model in training has parameters of several dtypes, frozen ones are fp32 too.
    """

    capabilities = frozenset()
    transparent = frozenset({"RegisterPostBackwardFunctionBackward"})

    def __init__(self, config: StrategyConfig, world: World) -> None:
        patches.require_fsdp()
        super().__init__(config, world)
        self._wrapped: WeakSet[nn.Module] = WeakSet()
        self._meshes: dict[int, DeviceMesh] = {}
        sharding.clear_mesh_caches()  # a script may have used the parameters of a closed strategy
        self._undo: list[Callable[[], None]] = [] if patches.MUON.missing() else [patches.MUON.apply()]

    @override
    def close(self) -> None:
        while self._undo:
            self._undo.pop()()
        for module in self._wrapped:
            stop_gathering_for_parts(module)
            sharding.release_groups(module)
        self._wrapped.clear()
        self._meshes.clear()
        sharding.clear_mesh_caches()
        gc.collect()  # meshes are cycles, which would keep process groups, their threads and sockets, for a while

    # Preparing

    @override
    def check_model(self, module: nn.Module, options: WrapOptions) -> None:
        _check_shardable(module)
        if self.config.bf16:
            check_batch_norms(module, "FSDP2", self.world.device)
        if options.training:
            check_gradient_hooks(module, "FSDP2")
        layers_to_shard(module, mixed_modalities=self.config.mixed_mm_data)

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        layers = layers_to_shard(module, mixed_modalities=self.config.mixed_mm_data)
        _make_contiguous(module)
        if options.training:
            _make_uniform(module)
        full_tensors = dict(module.named_parameters()) if self.world.rank == 0 else {}
        attributes = {name: attributes_of(parameter) for name, parameter in module.named_parameters()}
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
        sharding.load_from_rank_0(module, full_tensors, self.world)
        for name, parameter in module.named_parameters():
            set_attributes(parameter, attributes[name])
        keep_changes(module)
        gather_for_parts(module)
        self._wrapped.add(module)
        return module

    @override
    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Try the optimizer on DTensors, which it steps here; Muon gets whole matrices, see `lightrft.fsdp.patches`."""
        mesh = self._mesh(self.config.fsdp_shard_size)
        placements = [*[Replicate()] * (mesh.ndim - 1), Sharded(0)]

        def partition(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
            return [[distribute_tensor(tensor, mesh, placements, src_data_rank=None) for tensor in tensors]]

        check_elementwise(
            optimizer,
            partition,
            lambda parameter: parameter.ndim,
            device=self.world.device,
            refusal="FSDP2 gives it the rows of this rank, as DTensors. Use an optimizer that treats each element independently, for "
            "example AdamW, or torch.optim.Muon, or strategy 'deepspeed' with zero_stage=0",
        )

    def _mesh(self, shard_size: int) -> DeviceMesh:
        """Return the mesh on which ``shard_size`` ranks share a copy of the parameters; -1 means all."""
        ranks = self.world.size
        size = ranks if shard_size == -1 else shard_size
        if size < 1 or ranks % size:
            raise ConfigError(
                f"prepare: expected shard_size to divide the {ranks} ranks, got {shard_size}. Pass a divisor, or -1 "
                f"for all ranks"
            )
        if size not in self._meshes:
            shape, names = ((ranks,), ("shard",)) if size == ranks else ((ranks // size, size), ("replicate", "shard"))
            self._meshes[size] = init_device_mesh(self.world.device.type, shape, mesh_dim_names=names)
        return self._meshes[size]

    def _precision(self, options: WrapOptions) -> MixedPrecisionPolicy:
        reduce_dtype = _REDUCE_DTYPES[self.config.grad_accum_dtype] if options.training else None
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if self.config.bf16 else None, reduce_dtype=reduce_dtype)

    def _offload(self, options: WrapOptions) -> OffloadPolicy:
        if not (self.config.fsdp_cpu_offload and options.training):
            return OffloadPolicy()
        return CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")

    # Step

    @override
    def graph_leaves(self, trained: TrainedModel) -> Collection[int]:
        return sharding.gathered_parameters(trained.model)

    @contextmanager
    @override
    def forward_context(self, module: nn.Module, options: WrapOptions) -> Iterator[None]:
        """Reset FSDP2's state after a forward pass that failed, or the next one fails too. FSDP2 casts by itself."""
        try:
            yield
        except BaseException:
            _reset(module)
            raise

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        if isinstance(loss, DTensor):
            raise StrategyError(
                f"backward: expected a loss from the forward pass of {trained.class_name}, got one that uses its parameters directly "
                f"(a DTensor), which FSDP2 has sharded. Compute penalties over parameters in the model's forward"
            )
        try:
            loss.backward(retain_graph=retain_graph)
        except BaseException:
            _reset(trained.model)
            raise

    @override
    def reduce(self, trained: TrainedModel) -> None:
        """Reshard the model: each backward pass has reduced its gradients, but an evaluation may have followed it."""
        self.reshard(trained.model)

    @override
    def gradient_shards(self, trained: TrainedModel) -> Sequence[GradientShards]:
        by_group: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
        for parameter in trained.parameters:
            assert isinstance(parameter, DTensor)
            if parameter.grad is None:  # frozen after it was prepared
                continue
            assert isinstance(parameter.grad, DTensor)
            # Not the gradient's: that may carry the mesh of an earlier lifetime, see sharding.clear_mesh_caches.
            by_group.setdefault(sharding.shard_group(parameter), []).append(parameter.grad.to_local())
        return [GradientShards(tensors=tensors, group=group) for group, tensors in by_group.items()]

    # Sharding

    @override
    def reshard(self, module: nn.Module) -> None:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    @contextmanager
    @override
    def gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        yield sharding.gather(tensors, dtype, self.world.device)

    @override
    def shards(self, module: nn.Module) -> list[Shard]:
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
    """Raise `UnsupportedOperationError` for parameters that have no dim 0 to split."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UnsupportedOperationError(
            f"prepare: expected parameters with at least one dimension, along which FSDP2 splits them, got scalars: "
            f"{', '.join(scalars[:3])} of {type(module).__name__}. Give them shape (1,)"
        )


def _make_contiguous(module: nn.Module) -> None:
    """Make parameters contiguous, as FSDP2 requires: channels_last and transposed ones are not."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def _make_uniform(module: nn.Module) -> None:
    """Convert floating-point parameters to fp32 if their dtypes differ: FSDP2 gathers a layer as one buffer."""
    floating = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    if len({parameter.dtype for parameter in floating}) > 1:
        for parameter in floating:
            parameter.data = parameter.data.float()


def _reset(module: nn.Module) -> None:
    """Reset the state after a forward or backward pass that failed."""
    if isinstance(module, FSDPModule) and hasattr(module, "reset_iter_state"):  # torch 2.11 has none
        module.reset_iter_state()
