"""ZeRO-1 and 2: parameters whole on every rank; master weights, optimizer and, at stage 2, gradients in partitions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from typing_extensions import override

from lightrft.deepspeed.agreement import GradientOrder
from lightrft.deepspeed.ds_config import computes_in_bf16
from lightrft.deepspeed.engine import Engine
from lightrft.deepspeed.masters import KeptMasters
from lightrft.deepspeed.stages import Stage
from lightrft.strategy import flat
from lightrft.strategy.backend import cast
from lightrft.strategy.shards import Shard, StateSlice
from lightrft.strategy.training.optimizers import parameters_of
from lightrft.strategy.training.trained_model import TrainedModel


class Partitioned(Stage):
    """Stages 1 and 2. DeepSpeed lays each parameter group flat, and gives each rank a range of it.

    A parameter that is in an optimizer has ``_hp_mapping``: the fragment of its master that this rank owns, or None.
    """

    @property
    @override
    def capabilities(self) -> frozenset[str]:
        return frozenset({"uneven_modules"}) if self.config.zero_stage == 1 else frozenset()

    @override
    def bind(self, trained: TrainedModel) -> None:
        super().bind(trained)
        if self.config.zero_stage == 2 and self.world.size > 1:
            self.engines[trained.model].order = GradientOrder(trained.parameters, self.world)

    @override
    def _make_engine(self, trained: TrainedModel) -> Engine:
        if not computes_in_bf16(self.config):
            return super()._make_engine(trained)
        groups = [group["params"] for group in trained.optimizer.param_groups]
        masters = KeptMasters(groups, self.world.size, self.world.rank)
        engine = super()._make_engine(trained)
        masters.restore()
        return engine

    @override
    def update(self, trained: TrainedModel, factor: float) -> float | None:
        engine = self.engines[trained.model]
        if self.config.zero_stage == 1:
            engine.fill_missing()
        norm = engine.update(factor)
        if self.config.adam_offload:
            # Of parameters without a gradient DeepSpeed (0.19.8) takes the last update's once more, and adds to it.
            optimizer = engine.optimizer
            for gradient in (
                *(it.grad for it in optimizer.single_partition_of_fp32_groups),
                *optimizer.accumulated_grads_in_cpu.values(),
            ):
                gradient.zero_()
        return norm

    @override
    @contextmanager
    def gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        yield [self._whole(tensor, dtype) for tensor in tensors]

    @staticmethod
    def _whole(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        has_master = dtype is torch.float32 and tensor.dtype is not dtype and hasattr(tensor, "_hp_mapping")
        return safe_get_full_fp32_param(tensor) if has_master else cast(tensor, dtype)

    @override
    def shards(self, module: nn.Module) -> list[Shard]:
        found = (self._shard(name, parameter) for name, parameter in module.named_parameters())
        return [shard for shard in found if shard is not None]

    @staticmethod
    def _shard(name: str, parameter: nn.Parameter) -> Shard | None:
        if not hasattr(parameter, "_hp_mapping"):
            return Shard(name=name, shape=parameter.shape, offset=0, values=flat.elements(parameter))
        fragment = parameter._hp_mapping
        if fragment is None:
            return None
        values = fragment.hp_fragment.detach().view(-1)
        return Shard(name=name, shape=parameter.shape, offset=fragment.lp_fragment_address.start, values=values)

    @override
    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        partitions = {_memory(partition): partition for partition in parameters_of(trained.optimizer)}
        found = []
        for name, parameter in trained.model.named_parameters():
            shard = self._shard(name, parameter) if hasattr(parameter, "_hp_mapping") else None
            if shard is not None:
                key = partitions[_memory(shard.values)]
                start = int(shard.values.storage_offset() - key.storage_offset())
                found.append(StateSlice(shard=shard, key=key, start=start))
        return found

    @override
    def refresh(self, module: nn.Module) -> None:
        if module in self.engines:
            self.engines[module].optimizer.update_lp_params()


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
