"""`ZeroBackend`: what the backends of all ZeRO stages have in common."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import deepspeed.comm.comm as ds_comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import groups
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.deepspeed import patches
from lightrft.deepspeed.cpu_adam import resume_cpu_adam
from lightrft.deepspeed.detach import check_not_sharded, detach
from lightrft.deepspeed.ds_config import fit_bucket
from lightrft.deepspeed.model_offload import OffloadedStorages
from lightrft.deepspeed.parameter_sharding import undo_presharding
from lightrft.deepspeed.zero_checks import check_groups
from lightrft.deepspeed.zero_engine import ZeroEngine
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, World, WrapOptions, tensors_of

ConfigMaker = Callable[[], dict[str, Any]]
"""Returns a configuration of DeepSpeed."""


class ZeroBackend(ReplicatedBackend):
    """Trains with one DeepSpeed engine per model.

    Models stay the caller's own objects: DeepSpeed attaches to their parameters and replaces none. The optimizer is the
    caller's own too; from stage 1 on its parameters are DeepSpeed's flat partitions.
    """

    def __init__(
        self, config: StrategyConfig, world: World, *, train_config: ConfigMaker, eval_config: ConfigMaker
    ) -> None:
        """Join DeepSpeed to the process group. All ranks must call this. `close` undoes all of it.

        Args:
            config: The settings, as `stage_limits.validate` returned them.
            world: The ranks.
            train_config: Returns DeepSpeed's configuration; called for each model in training, as it is prepared.
            eval_config: The same for models that do not train.
        """
        super().__init__(config, world)
        self.train_config, self.eval_config = train_config, eval_config
        self.engines: dict[nn.Module, ZeroEngine] = {}
        self._offloaded: dict[nn.Module, OffloadedStorages] = {}
        with ExitStack() as undo:
            patches.apply_to_process(undo)
            _join_process_group(config, world, undo)
            self._undo = undo.pop_all()

    # Lifecycle

    @override
    def close(self) -> None:
        """Detach DeepSpeed from all models, and restore what it keeps for the process."""
        self.engines.clear()
        self._offloaded.clear()
        self._undo.close()
        gc.collect()  # engines are cycles, which would keep process groups, their threads and sockets, for a while

    # Preparing

    @override
    def undo_presharding(self, module: nn.Module) -> None:
        undo_presharding(module, self.world)

    @override
    def check_model(self, module: nn.Module, options: WrapOptions) -> None:
        check_not_sharded(module)

    @override
    def algorithm(self, optimizer: Optimizer) -> str:
        if isinstance(optimizer, (DeepSpeedCPUAdam, FusedAdam)):
            return "AdamW" if optimizer.adam_w_mode else "Adam"
        return super().algorithm(optimizer)

    @override
    def bind(self, trained: TrainedModel) -> None:
        """Make the engine that trains the model."""
        check_groups(trained.optimizer)
        self._undo.callback(detach, trained.model)
        self._add_engine(trained.model, self._make_engine(trained))

    def _make_engine(self, trained: TrainedModel) -> ZeroEngine:
        """Return the engine of a model in training. A stage that keeps more than DeepSpeed does overrides this."""
        return self._default_engine(trained)

    def _default_engine(self, trained: TrainedModel) -> ZeroEngine:
        elements = sum(self.full_shape(parameter).numel() for parameter in trained.parameters)
        return ZeroEngine(trained.model, fit_bucket(self.train_config(), elements), trained.optimizer)

    def _add_engine(self, module: nn.Module, engine: ZeroEngine) -> None:
        self.engines[module] = engine
        self._undo.callback(engine.remove)

    # Sharding

    @override
    def resume_optimizer(self, trained: TrainedModel) -> None:
        if isinstance(trained.optimizer, DeepSpeedCPUAdam):
            resume_cpu_adam(trained.optimizer)

    # Offload

    @override
    def move_model(self, module: nn.Module, device: torch.device) -> None:
        if self.world.device.type == "cpu":
            return
        if device.type == "cpu":
            self.offload(module)
        else:
            self.reload(module)

    def offload(self, module: nn.Module) -> None:
        """Free the device memory of ``module``: parameters, buffers, gradients, master weights."""
        device = self.world.device.type
        self._offloaded[module] = OffloadedStorages(
            tensor for tensor in self.tensors_on_device(module) if tensor.device.type == device
        )

    def reload(self, module: nn.Module) -> None:
        """Undo `offload`; does nothing if ``module`` is not offloaded."""
        offloaded = self._offloaded.pop(module, None)
        if offloaded is not None:
            offloaded.reload()

    def tensors_on_device(self, module: nn.Module) -> Iterator[torch.Tensor]:
        """Yield every tensor that belongs to ``module``, except the state of the caller's optimizer."""
        for _, tensor in tensors_of(module):
            yield tensor.data
            if tensor.grad is not None:
                yield tensor.grad
        if module in self.engines:
            yield from self.engines[module].tensors()


def _join_process_group(config: StrategyConfig, world: World, undo: ExitStack) -> None:
    """Make DeepSpeed use torch's default process group, with groups that exist before a model is prepared.

    Made now, the groups get the strategy's timeout before a first collective runs in them.
    """
    if ds_comm.cdb is None:
        with ExitStack() as during_init:
            during_init.callback(patches.SHARED_MEMORY_OPERATOR.apply())
            ds_comm.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    for patch in (patches.ALL_GATHER, patches.REDUCE_SCATTER):
        undo.callback(patch.apply(ds_comm.cdb))
    groups._clone_world_group()
    if config.zero_stage == 3 and config.zpg > 1:
        groups._create_zero_param_parallel_group(config.zpg)
    # A rank that closes at once must not break the connections that the others still make for these groups.
    dist.all_reduce(torch.zeros(1), group=world.cpu_group)
