"""PyTorch's `DistributedDataParallel` as a LightRFT strategy: every rank has the full model and optimizer.

This module defines how a model is wrapped and when its gradients are averaged. `StrategyBase` does the rest: counting,
scaling, clipping, skipping, schedules, checkpoints and rollouts.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.strategy import StrategyBase
from lightrft.strategy.backend import ReplicatedBackend, World, WrapOptions, replicate


class DDPBackend(ReplicatedBackend):
    """Accumulates gradients on each rank; `ReplicatedBackend.reduce` averages them once per update."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._wrappers: dict[nn.Module, DistributedDataParallel] = {}

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        replicate(module, self.world)
        if not options.training or self.world.size == 1:
            return module
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        # each rank keeps its own buffers, as in every strategy
        self._wrappers[module] = DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
        return self._wrappers[module]

    @override
    @contextmanager
    def forward_context(self, module: nn.Module, options: WrapOptions) -> Iterator[None]:
        # without no_sync, DDP would average gradients in every backward pass
        wrapper = self._wrappers.get(module)
        with super().forward_context(module, options), wrapper.no_sync() if wrapper else nullcontext():
            yield

    @override
    def close(self) -> None:
        self._wrappers.clear()
        gc.collect()  # DDP and its reducer form reference cycles, which would keep the process group alive


class DDPStrategy(StrategyBase):
    """Data parallelism by `DistributedDataParallel`."""

    name = "ddp"
    backend_class = DDPBackend
