"""`DeepspeedStrategy`: DeepSpeed ZeRO behind the contract of `StrategyBase`.

This module only hands each hook to the chosen ZeRO stage (`lightrft.deepspeed.stages`), which is where
DeepSpeed is loaded: importing this one loads none of it.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.deepspeed import ds_config, stage_limits
from lightrft.deepspeed.checks import check_nothing_is_empty, check_still_trained
from lightrft.deepspeed.environment import prepare_environment
from lightrft.deepspeed.removal import check_whole
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.shards import Shard, StateSlice
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.strategy.training.optimizers import parameter_groups
from lightrft.strategy.training.trained_model import TrainedModel

if TYPE_CHECKING:
    from lightrft.deepspeed.stages import Stage


class DeepspeedStrategy(StrategyBase):
    """ZeRO stages 0 to 3, on CPU and CUDA.

    Prepared models are the callers' own objects, not wrapped. At stages 1 to 3 with ``bf16`` DeepSpeed stores
    them in bfloat16, frozen parameters too, beside fp32 masters of what trains; stage 0 and models that do not
    train run under autocast, in the type in which they came.
    """

    name = "deepspeed"
    honours = frozenset({"zero_stage", "zpg", "overlap_comm", "grad_accum_dtype", "adam_offload"})
    transparent = frozenset(
        {
            "PreBackwardFunctionForModuleBackward",
            "PostBackwardFunctionModuleBackward",
            "LinearFunctionForZeroStage3Backward",
        }
    )

    @override
    def _setup(self) -> None:
        self.config = stage_limits.honourable(self.config, self.world)
        prepare_environment(self.config, self.world)
        from lightrft.deepspeed.runtime import Runtime

        self._runtime = Runtime.open(self.config, self.world)
        self._stage = self._make_stage()
        self.capabilities = self._stage.capabilities

    def _make_stage(self) -> "Stage":
        from lightrft.deepspeed.partitioned import Partitioned
        from lightrft.deepspeed.replicated import Replicated
        from lightrft.deepspeed.sharded import Sharded
        from lightrft.deepspeed.stages import Configs

        kinds = (Replicated, Partitioned, Partitioned, Sharded)
        configs = Configs(train=self.get_ds_train_config, eval=self.get_ds_eval_config)
        return kinds[self.config.zero_stage](self.config, self.world, configs)

    @override
    def _teardown(self) -> None:
        self._stage.close()
        self._runtime.close()
        gc.collect()  # engines are cycles, which would keep process groups, their threads and sockets, for a while

    # DeepSpeed's configuration

    def get_ds_train_config(self, is_actor: bool = False) -> dict[str, Any]:
        """DeepSpeed's configuration of models in training; a subclass that overrides it may add what is DeepSpeed's own.

        ``is_actor`` is LightRFT's, and makes no difference.
        """
        return ds_config.train_config(self.config, pin_memory=self.world.device.type == "cuda")

    def get_ds_eval_config(self, offload: bool = False) -> dict[str, Any]:
        """DeepSpeed's configuration of models that do not train; ``offload``: with their shards in host memory."""
        return ds_config.eval_config(self.config, offload=offload, pin_memory=self.world.device.type == "cuda")

    # Preparing

    @override
    def _check_model(self, module: nn.Module, options: WrapOptions) -> None:
        check_whole(module)
        if self.config.zero_stage == 3:
            check_nothing_is_empty(module)

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        self._stage.wrap(module, options)
        return module

    @override
    def _create_optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        if not self.config.adam_offload or self.config.zero_stage == 0:
            return super()._create_optimizer(module, **settings)
        from lightrft.deepspeed.operators import cpu_adam

        weight_decay = settings.pop("weight_decay", 0.0)
        return cpu_adam(parameter_groups(module, weight_decay), **settings)

    @override
    def _algorithm(self, optimizer: Optimizer) -> str:
        if type(optimizer).__name__ in ("DeepSpeedCPUAdam", "FusedAdam"):
            return "AdamW" if optimizer.adam_w_mode else "Adam"  # type: ignore[attr-defined]
        return super()._algorithm(optimizer)

    @override
    def _bind(self, trained: TrainedModel) -> None:
        self._stage.bind(trained)

    @override
    def _forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        return self._stage.forward_context(module)

    # A step

    @override
    def _backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        self._stage.backward(trained, loss, retain_graph)

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        if self.config.zero_stage > 0:
            check_still_trained(trained)
        norm = self._stage.update(trained, factor)
        return super()._update(trained, factor) if norm is None else norm

    # Parameters, at rest and whole

    @override
    def _settle(self, module: nn.Module) -> None:
        self._stage.settle(module)

    @override
    @contextmanager
    def _gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        with self._stage.gathered(tensors, dtype) as whole:
            yield whole

    @override
    def _full_shape(self, tensor: torch.Tensor) -> torch.Size:
        return self._stage.full_shape(tensor)

    @override
    def _shards(self, module: nn.Module) -> list[Shard]:
        return self._stage.shards(module)

    @override
    def _state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        slices = self._stage.state_slices(trained)
        return super()._state_slices(trained) if slices is None else slices

    @override
    def _refresh(self, module: nn.Module) -> None:
        self._stage.refresh(module)

    @override
    def _resume_optimizer(self, trained: TrainedModel) -> None:
        if type(trained.optimizer).__name__ == "DeepSpeedCPUAdam":
            from lightrft.deepspeed.operators import resume_cpu_adam

            resume_cpu_adam(trained.optimizer)

    # Memory

    @override
    def _move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        """Called with ``adam_offload`` only, and then, from stage 1 on, the state is in host memory for good."""
        if self.config.zero_stage == 0:
            super()._move_optimizer(trained, device)

    @override
    def _move_model(self, module: nn.Module, device: torch.device) -> None:
        if self.world.device.type == "cpu":
            return
        if device.type == "cpu":
            self._stage.park(module)
        else:
            self._stage.unpark(module)
