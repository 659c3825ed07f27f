"""`Zero3Backend`: parameters, gradients, master weights and optimizer state are sharded, parameter by parameter."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.utils import is_zero_param
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import nn
from typing_extensions import override

from lightrft.config import StrategyConfig, StrategyError, UnsupportedOperationError
from lightrft.deepspeed.detach import detach
from lightrft.deepspeed.ds_config import computes_in_bf16
from lightrft.deepspeed.master_weights import take_over
from lightrft.deepspeed.parameter_sharding import (
    gather_in_forward,
    note_updates,
    owned_range,
    refuse_state_dict,
    shard_module,
)
from lightrft.deepspeed.patches import GRADIENT_NORM
from lightrft.deepspeed.zero1_backend import Zero1Backend
from lightrft.deepspeed.zero_backend import ConfigMaker
from lightrft.deepspeed.zero_checks import check_not_written, check_nothing_is_empty, check_still_trained
from lightrft.deepspeed.zero_engine import ZeroEngine
from lightrft.strategy.backend import Shard, StateSlice, TrainedModel, World, WrapOptions, cast

_OF_AN_EMPTY_PARAMETER = (r"returned an invalid gradient.*\[0\]", r"^0 != \d+ Cannot reduce scatter gradients")
"""What a backward pass raises for a loss that uses a parameter directly: torch's error, and DeepSpeed's for a large one."""


class Zero3Backend(Zero1Backend):
    """ZeRO stage 3. A parameter has this rank's range, padded at the end, as ``ds_tensor``, and is empty except in use."""

    capabilities = frozenset()
    transparent = frozenset(
        {
            "PreBackwardFunctionForModuleBackward",
            "PostBackwardFunctionModuleBackward",
            "LinearFunctionForZeroStage3Backward",
        }
    )

    def __init__(
        self, config: StrategyConfig, world: World, *, train_config: ConfigMaker, eval_config: ConfigMaker
    ) -> None:
        super().__init__(config, world, train_config=train_config, eval_config=eval_config)
        self._stop_gathering: dict[nn.Module, Callable[[], None]] = {}
        """For models in training without an optimizer yet: how to stop gathering all parameters in each forward pass."""
        self._undo.callback(self._stop_gathering.clear)
        self._updated: dict[nn.Module, set[nn.Parameter]] = {}
        """By model in training, the parameters that `GatheredParameters` has written since their master weights were read."""
        self._undo.callback(self._updated.clear)

    # Preparing

    @override
    def check_model(self, module: nn.Module, options: WrapOptions) -> None:
        super().check_model(module, options)
        check_nothing_is_empty(module)

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        secondary = groups._get_zero_param_intra_parallel_group() if options.training else None
        self._undo.callback(detach, module)
        shard_module(module, self.world, groups._get_data_parallel_group(), secondary)
        refuse_state_dict(module)
        if options.training:
            self._stop_gathering[module] = gather_in_forward(module)
            self._undo.callback(self._stop_gathering[module])
        else:
            self._add_engine(module, ZeroEngine(module, self.eval_config()))
        return module

    @override
    def bind(self, trained: TrainedModel) -> None:
        super().bind(trained)
        self._updated[trained.model] = updated = set[nn.Parameter]()
        for parameter in trained.parameters:
            note_updates(parameter, updated)

    @override
    def _make_engine(self, trained: TrainedModel) -> ZeroEngine:
        self._stop_gathering.pop(trained.model)()
        fp32_weights: dict[Any, torch.Tensor] = {}
        if computes_in_bf16(self.config):
            fp32_weights = {parameter: parameter.ds_tensor.data for parameter in trained.parameters}  # type: ignore[attr-defined]
            for parameter in trained.model.parameters():
                _store_as(parameter, torch.bfloat16)
        engine = self._default_engine(trained)
        engine.patch(GRADIENT_NORM, engine.optimizer)
        for parameter, values in fp32_weights.items():
            if _has_master(parameter):
                _master(engine, parameter).copy_(values)
        return engine

    @contextmanager
    @override
    def forward_context(self, module: nn.Module, options: WrapOptions) -> Iterator[None]:
        """Turn inference_mode into no_grad: DeepSpeed would give parameters data that cannot train any more."""
        with ExitStack() as contexts:
            if torch.is_inference_mode_enabled():
                contexts.enter_context(torch.inference_mode(False))
                contexts.enter_context(torch.no_grad())
            contexts.enter_context(super().forward_context(module, options))
            yield

    # Step

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        if retain_graph:
            raise UnsupportedOperationError(
                f"backward: expected retain_graph=False at zero_stage 3, got True for {trained.class_name}. The backward pass "
                f"frees the parameters in the graph, so it cannot be repeated. Add the losses and call backward once"
            )
        try:
            super().backward(trained, loss, retain_graph=retain_graph)
        except RuntimeError as error:
            if not any(re.search(pattern, str(error)) for pattern in _OF_AN_EMPTY_PARAMETER):
                raise
            raise StrategyError(
                f"backward: expected a loss from the forward pass of {trained.class_name}, got one that uses its parameters "
                f"directly, which are empty outside it at zero_stage 3. Compute penalties over parameters in the model's forward"
            ) from error

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        check_still_trained(trained)
        self._take_over_updates(trained.model)
        check_not_written(trained, self._writes[trained.model].pending())
        engine = self.engines[trained.model]
        norm = engine.update(factor)
        # DeepSpeed would take the last update's gradient again for a parameter that gets none, or add to it:
        # https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage3.py#L1421-L1428
        engine.optimizer.grad_partitions_flat_buffer.zero_()
        if self.config.adam_offload:
            for partition in engine.optimizer.fp32_partitioned_groups_flat:
                partition.grad.zero_()
        return norm

    # Sharding

    @override
    def reshard(self, module: nn.Module) -> None:
        """Free gathered parameters, including the small ones that DeepSpeed keeps; take over what a script has written."""
        self._take_over_updates(module)
        engine = self.engines.get(module)
        if engine is not None:
            engine.optimizer.empty_partition_cache()

    def _take_over_updates(self, module: nn.Module) -> None:
        updated = self._updated.get(module, set())
        if updated:
            self._writes[module].take()
        while updated:
            parameter: Any = updated.pop()
            take_over(parameter.ds_tensor, _master(self.engines[module], parameter))

    @contextmanager
    @override
    def gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        """Yield the full tensors; if fp32 is requested, the master weights of those that have them."""
        master_weights = {
            tensor: safe_get_full_fp32_param(tensor)
            for tensor in tensors
            if dtype is torch.float32 and tensor.dtype is not dtype and _has_master(tensor)
        }
        with GatheredParameters(
            [tensor for tensor in tensors if is_zero_param(tensor) and tensor not in master_weights]
        ):
            yield [master_weights[tensor] if tensor in master_weights else cast(tensor, dtype) for tensor in tensors]

    @override
    def full_shape(self, tensor: torch.Tensor) -> torch.Size:
        return torch.Size(tensor.ds_shape) if is_zero_param(tensor) else tensor.shape  # type: ignore[attr-defined]

    @override
    def shards(self, module: nn.Module) -> list[Shard]:
        shards = (self._shard_of(module, name, parameter) for name, parameter in module.named_parameters())
        return [shard for shard in shards if shard.values.numel()]

    def _shard_of(self, module: nn.Module, name: str, parameter: nn.Parameter) -> Shard:
        owned = owned_range(parameter, self.world.rank)
        padded = _master(self.engines[module], parameter) if _has_master(parameter) else parameter.ds_tensor  # type: ignore[attr-defined]
        values = padded.detach().view(-1)[: len(owned)]
        return Shard(name=name, shape=self.full_shape(parameter), offset=owned.start, values=values)

    @override
    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        optimizer = self.engines[trained.model].optimizer
        slices: list[tuple[int, StateSlice]] = []
        for name, parameter in trained.model.named_parameters():
            if _has_master(parameter):
                group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
                key, shard = (
                    optimizer.fp32_partitioned_groups_flat[group],
                    self._shard_of(trained.model, name, parameter),
                )
                slices.append((group, StateSlice(shard=shard, key=key, start=start)))
        return [state_slice for _, state_slice in sorted(slices, key=lambda pair: pair[0])]

    @override
    def sync_from_master(self, module: nn.Module) -> None:
        self.reshard(module)
        if module in self._writes:
            self._writes[module].take()  # what a script has written to the shards is replaced
        engine = self.engines.get(module)
        if engine is not None and hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
            for index in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
                engine.optimizer._reassign_or_swap_out_partitioned_parameters(index)
            engine.optimizer.invalidate_secondary_tensor()

    # Offload

    @override
    def tensors_on_device(self, module: nn.Module) -> Iterator[torch.Tensor]:
        yield from super().tensors_on_device(module)
        for parameter in module.parameters():
            yield parameter.ds_tensor  # type: ignore[attr-defined]


def _store_as(parameter: Any, dtype: torch.dtype) -> None:
    """Store a sharded, floating parameter in ``dtype``."""
    if parameter.is_floating_point():
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(dtype)
        parameter.ds_secondary_tensor = None
        parameter.data = torch.empty(0, dtype=dtype, device=parameter.device)


def _has_master(tensor: torch.Tensor) -> bool:
    optimizer = getattr(tensor, "_z3_optimizer", None)
    return optimizer is not None and optimizer.get_param_id(tensor) in optimizer.grad_position


def _master(engine: ZeroEngine, parameter: nn.Parameter) -> torch.Tensor:
    """Return this rank's range of the fp32 master weight, padded: a view."""
    group, start, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
    partition: torch.Tensor = engine.optimizer.fp32_partitioned_groups_flat[group].detach()
    return partition.narrow(0, start, length)
