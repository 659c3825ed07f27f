"""`Zero1Backend` and `Zero2Backend`: full parameters; master weights and optimizer state in partitions."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.deepspeed.cpu_adam import cpu_adam
from lightrft.deepspeed.ds_config import computes_in_bf16
from lightrft.deepspeed.gradient_order import GradientOrder
from lightrft.deepspeed.input_casting import cast_inputs
from lightrft.deepspeed.master_weights import Fp32Weights, Writes, take_over
from lightrft.deepspeed.patches import before_reduction
from lightrft.deepspeed.zero_backend import ConfigMaker, ZeroBackend
from lightrft.deepspeed.zero_checks import check_can_be_partitioned, check_on_flat_parts, check_still_trained
from lightrft.deepspeed.zero_engine import ZeroEngine
from lightrft.strategy.backend import (
    Shard,
    StateSlice,
    TrainedModel,
    World,
    WrapOptions,
    cast,
    check_batch_norms,
    check_gradient_hooks,
    elements,
    parameter_groups,
    parameters_of,
)


class Zero1Backend(ZeroBackend):
    """ZeRO stage 1. DeepSpeed flattens each parameter group and gives each rank a range of it.

    A parameter in an optimizer has ``_hp_mapping``: the fragment of its master weight that this rank owns, or None.
    """

    def __init__(
        self, config: StrategyConfig, world: World, *, train_config: ConfigMaker, eval_config: ConfigMaker
    ) -> None:
        super().__init__(config, world, train_config=train_config, eval_config=eval_config)
        self._writes: dict[nn.Module, Writes] = {}
        self._undo.callback(self._writes.clear)

    # Preparing

    @override
    def check_model(self, module: nn.Module, options: WrapOptions) -> None:
        super().check_model(module, options)
        if options.training:
            check_gradient_hooks(module, f"ZeRO-{self.config.zero_stage}")
            if computes_in_bf16(self.config):
                check_batch_norms(module, f"ZeRO-{self.config.zero_stage}", self.world.device)

    @override
    def create_optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        """Return AdamW, with ``adam_offload`` DeepSpeed's on the CPU."""
        if not self.config.adam_offload:
            return super().create_optimizer(module, **settings)
        return cpu_adam(parameter_groups(module, settings.pop("weight_decay", 0.0)), **settings)

    @override
    def check_optimizer(self, optimizer: Optimizer) -> None:
        check_can_be_partitioned(optimizer)
        check_on_flat_parts(optimizer, self.world, self.full_shape)

    @override
    def bind(self, trained: TrainedModel) -> None:
        """Make the engine that trains the model. Its optimizer holds flat partitions from now on."""
        super().bind(trained)
        self._writes[trained.model] = Writes(trained.parameters)
        if computes_in_bf16(self.config):
            self._undo.callback(cast_inputs(trained.model, torch.bfloat16).remove)

    @override
    def _make_engine(self, trained: TrainedModel) -> ZeroEngine:
        if not computes_in_bf16(self.config):
            return self._default_engine(trained)
        groups = [group["params"] for group in trained.optimizer.param_groups]
        fp32_weights = Fp32Weights(groups, self.world.size, self.world.rank)
        engine = self._default_engine(trained)
        fp32_weights.restore()
        return engine

    @override
    def forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        """Return autocast with ``bf16``, except for models in training, which DeepSpeed stores in bfloat16."""
        if options.training and module in self.engines:
            return nullcontext()
        return super().forward_context(module, options)

    # Step

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        self.engines[trained.model].add_gradient(loss, retain_graph)

    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        """Reduce, scale by ``factor``, clip and step; return the norm before clipping."""
        check_still_trained(trained)
        self.reshard(trained.model)
        self.engines[trained.model].fill_missing_gradients()
        return self._step(trained, factor)

    def _step(self, trained: TrainedModel, factor: float) -> float:
        engine = self.engines[trained.model]
        norm = engine.update(factor)
        if self.config.adam_offload:
            # DeepSpeed would add to the last update's gradient of a parameter that gets none:
            # https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py#L1852-L1856
            for partition in engine.optimizer.single_partition_of_fp32_groups:
                partition.grad.zero_()
            for gradient in engine.optimizer.accumulated_grads_in_cpu.values():
                gradient.zero_()
        return norm

    # Sharding

    @override
    def reshard(self, module: nn.Module) -> None:
        """Give the master weights what a script has written to the parameters."""
        if module in self._writes:
            for parameter in self._writes[module].take():
                self._take_over(module, parameter)

    def _take_over(self, module: nn.Module, parameter: nn.Parameter) -> None:
        shard = self._shard("", parameter)
        if shard is not None:
            take_over(shard.of(parameter.detach()), shard.values)

    @contextmanager
    @override
    def gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        """Yield the tensors; if fp32 is requested, the master weights of those that have them."""
        yield [self._full(tensor, dtype) for tensor in tensors]

    @staticmethod
    def _full(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        has_master = dtype is torch.float32 and tensor.dtype is not dtype and hasattr(tensor, "_hp_mapping")
        return safe_get_full_fp32_param(tensor) if has_master else cast(tensor, dtype)

    @override
    def shards(self, module: nn.Module) -> list[Shard]:
        shards = (self._shard(name, parameter) for name, parameter in module.named_parameters())
        return [shard for shard in shards if shard is not None]

    @staticmethod
    def _shard(name: str, parameter: nn.Parameter) -> Shard | None:
        if not hasattr(parameter, "_hp_mapping"):
            return Shard(name=name, shape=parameter.shape, offset=0, values=elements(parameter))
        fragment = parameter._hp_mapping
        if fragment is None:
            return None
        values = fragment.hp_fragment.detach().view(-1)
        return Shard(name=name, shape=parameter.shape, offset=fragment.lp_fragment_address.start, values=values)

    @override
    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        partitions = {_memory(partition): partition for partition in parameters_of(trained.optimizer)}
        slices = []
        for name, parameter in trained.model.named_parameters():
            shard = self._shard(name, parameter) if hasattr(parameter, "_hp_mapping") else None
            if shard is not None:
                key = partitions[_memory(shard.values)]
                start = int(shard.values.storage_offset() - key.storage_offset())
                slices.append(StateSlice(shard=shard, key=key, start=start))
        return slices

    @override
    def sync_from_master(self, module: nn.Module) -> None:
        if module in self.engines:
            self.engines[module].optimizer.update_lp_params()

    # Offload

    @override
    def move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        """Do nothing: this is called with ``adam_offload`` only, which always keeps the state in host memory."""


class Zero2Backend(Zero1Backend):
    """ZeRO stage 2: gradients are in partitions too, and are reduced in each backward pass."""

    capabilities = frozenset()

    @override
    def bind(self, trained: TrainedModel) -> None:
        super().bind(trained)
        if self.world.size > 1:
            engine, order = self.engines[trained.model], GradientOrder(trained.parameters, self.world)
            self._undo.callback(order.remove)
            engine.patch(before_reduction(order.check), engine)

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        check_still_trained(trained)
        self.reshard(trained.model)
        return self._step(trained, factor)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
