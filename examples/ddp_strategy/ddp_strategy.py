"""PyTorch's `DistributedDataParallel` as a LightRFT strategy: every rank has the whole model and optimizer.

Everything that is its own is here: how a model is wrapped, and when its gradients are averaged. Counting, scaling,
clipping, skipping, schedules, checkpoints and rollouts are `StrategyBase`'s.
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
    """Accumulates gradients on each rank, and averages them once an update, in `ReplicatedBackend.reduce`."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._wrappers: dict[nn.Module, DistributedDataParallel] = {}

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        replicate(module, self.world)
        if not options.training or self.world.size == 1:
            return module
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        # buffers stay each rank's own, as on every strategy
        self._wrappers[module] = DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)
        return self._wrappers[module]

    @override
    @contextmanager
    def forward_context(self, module: nn.Module, options: WrapOptions) -> Iterator[None]:
        # DDP would average in the backward pass of every micro-batch, and once only where a micro-batch has several
        wrapper = self._wrappers.get(module)
        with super().forward_context(module, options), wrapper.no_sync() if wrapper else nullcontext():
            yield

    @override
    def close(self) -> None:
        self._wrappers.clear()
        gc.collect()  # DDP and its reducer are cycles, which would keep the process group for a while


class DDPStrategy(StrategyBase):
    """Data parallelism by `DistributedDataParallel`."""

    name = "ddp"
    backend_class = DDPBackend
