"""ZeRO-3: parameters, gradients, master weights and optimizer are sharded, parameter by parameter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.utils import is_zero_param
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import nn
from typing_extensions import override

from lightrft.config import UnsupportedOperationError
from lightrft.deepspeed.ds_config import computes_in_bf16
from lightrft.deepspeed.engine import Engine
from lightrft.deepspeed.removal import strip
from lightrft.deepspeed.sharding import gather_in_forward, owned_part, shard
from lightrft.deepspeed.stages import Stage
from lightrft.strategy.backend import WrapOptions, cast
from lightrft.strategy.shards import Shard, StateSlice
from lightrft.strategy.training.trained_model import TrainedModel


class Sharded(Stage):
    """Stage 3. A parameter has this rank's part, padded at the end, as ``ds_tensor``, and is empty itself but in use."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._unbound: dict[nn.Module, Callable[[], None]] = {}
        """Models that wait for their optimizer, with what undoes their gathering."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> None:
        secondary = groups._get_zero_param_intra_parallel_group() if options.training else None
        shard(module, self.world, groups._get_data_parallel_group(), secondary)
        if options.training:
            self._unbound[module] = gather_in_forward(module)
        else:
            self.engines[module] = Engine(module, self._configs.eval())

    @override
    def _make_engine(self, trained: TrainedModel) -> Engine:
        self._unbound.pop(trained.model)()
        if not computes_in_bf16(self.config):
            return _with_fp32_overflow(super()._make_engine(trained))
        kept: dict[Any, torch.Tensor] = {it: it.ds_tensor.data for it in trained.parameters}  # type: ignore[attr-defined]
        for parameter in trained.model.parameters():
            _store_as(parameter, torch.bfloat16)
        engine = _with_fp32_overflow(super()._make_engine(trained))
        for parameter, values in kept.items():
            if _has_master(parameter):
                _master(engine, parameter).copy_(values)
        return engine

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        if retain_graph:
            raise UnsupportedOperationError(
                f"backward of {trained.kind} with retain_graph=True: at zero_stage 3 the graph holds parameters that are "
                f"given back as it is walked, so it cannot be walked twice; add the losses up and call backward once"
            )
        super().backward(trained, loss, retain_graph)

    @override
    def update(self, trained: TrainedModel, factor: float) -> float | None:
        engine = self.engines[trained.model]
        norm = engine.update(factor)
        # Of parameters without a gradient DeepSpeed (0.19.8) takes the last update's once more, and adds to it.
        engine.optimizer.grad_partitions_flat_buffer.zero_()
        if self.config.adam_offload:
            for partition in engine.optimizer.fp32_partitioned_groups_flat:
                partition.grad.zero_()
        return norm

    @override
    def settle(self, module: nn.Module) -> None:
        """Let go of whole parameters, the small ones that DeepSpeed keeps included, so that the shards are all there is."""
        engine = self.engines.get(module)
        if engine is not None:
            engine.optimizer.empty_partition_cache()

    @override
    @contextmanager
    def gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        masters = {
            tensor: safe_get_full_fp32_param(tensor)
            for tensor in tensors
            if dtype is torch.float32 and tensor.dtype is not dtype and _has_master(tensor)
        }
        with GatheredParameters([tensor for tensor in tensors if is_zero_param(tensor) and tensor not in masters]):
            yield [masters[tensor] if tensor in masters else cast(tensor, dtype) for tensor in tensors]

    @override
    def full_shape(self, tensor: torch.Tensor) -> torch.Size:
        return torch.Size(tensor.ds_shape) if is_zero_param(tensor) else tensor.shape  # type: ignore[attr-defined]

    @override
    def shards(self, module: nn.Module) -> list[Shard]:
        found = (self._shard(module, name, parameter) for name, parameter in module.named_parameters())
        return [shard for shard in found if shard.values.numel()]

    def _shard(self, module: nn.Module, name: str, parameter: nn.Parameter) -> Shard:
        part = owned_part(parameter, self.world.rank)
        held = _master(self.engines[module], parameter) if _has_master(parameter) else parameter.ds_tensor  # type: ignore[attr-defined]
        shape = self.full_shape(parameter)
        return Shard(name=name, shape=shape, offset=part.start, values=held.detach().view(-1)[: len(part)])

    @override
    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        optimizer = self.engines[trained.model].optimizer
        found: list[tuple[int, StateSlice]] = []
        for name, parameter in trained.model.named_parameters():
            if _has_master(parameter):
                group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
                key, shard = optimizer.fp32_partitioned_groups_flat[group], self._shard(trained.model, name, parameter)
                found.append((group, StateSlice(shard=shard, key=key, start=start)))
        return [part for _, part in sorted(found, key=lambda pair: pair[0])]

    @override
    def refresh(self, module: nn.Module) -> None:
        self.settle(module)
        engine = self.engines.get(module)
        if engine is not None and hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
            for index in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
                engine.optimizer._reassign_or_swap_out_partitioned_parameters(index)
            engine.optimizer.invalidate_secondary_tensor()

    @override
    def _held(self, module: nn.Module) -> Iterator[torch.Tensor]:
        yield from super()._held(module)
        for parameter in module.parameters():
            yield parameter.ds_tensor  # type: ignore[attr-defined]

    @override
    def close(self) -> None:
        for module, undo in self._unbound.items():
            undo()
            strip(module)
        self._unbound.clear()
        super().close()


def _store_as(parameter: Any, dtype: torch.dtype) -> None:
    """Store a sharded, floating parameter in ``dtype``."""
    if parameter.is_floating_point():
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)
        parameter.ds_secondary_tensor = None
        parameter.data = torch.empty(0, dtype=dtype, device=parameter.device)


def _has_master(tensor: torch.Tensor) -> bool:
    optimizer = getattr(tensor, "_z3_optimizer", None)
    return optimizer is not None and optimizer.get_param_id(tensor) in optimizer.grad_position


def _master(engine: Engine, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of the fp32 master, padded, a view."""
    group, start, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
    partition: torch.Tensor = engine.optimizer.fp32_partitioned_groups_flat[group].detach()
    return partition.narrow(0, start, length)


def _with_fp32_overflow(engine: Engine) -> Engine:
    """Let a gradient whose squared norm exceeds fp32 count as not finite, as everywhere else.

    Stage 3 (0.19.8) alone keeps its norm in fp64; Adam's second moment, in fp32, would become infinite for good.
    """
    original = engine.optimizer.get_grad_norm_direct

    def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = original(*args, **kwargs)
        return torch.where(found.square().float().isinf(), -1.0, found)  # -1: DeepSpeed's sign for "not finite"

    engine.optimizer.get_grad_norm_direct = norm
    return engine
