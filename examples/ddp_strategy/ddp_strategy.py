"""PyTorch's `DistributedDataParallel` as a LightRFT strategy: every rank has the whole model and optimizer.

All that is its own is here: what a model is wrapped in. Counting, scaling, clipping, skipping, schedules,
checkpoints and rollouts are `StrategyBase`'s.
"""

import gc

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightrft.config import UnsupportedOperationError
from lightrft.strategy import StrategyBase
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.training.modules import replicate
from lightrft.strategy.training.trained_model import TrainedModel


class DDPStrategy(StrategyBase):
    """Gradients are averaged over the ranks during each backward, and every rank makes the same update."""

    name = "ddp"
    capabilities = frozenset({"uneven_modules"})
    transparent = frozenset({"_DDPSinkBackward"})

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        replicate(module, self.world)
        if not options.training or self.world.size == 1:
            return module
        # what a rank did not use counts as a zero gradient there; buffers stay each rank's own, as everywhere else
        return DistributedDataParallel(
            module, device_ids=self._device_ids(), find_unused_parameters=True, broadcast_buffers=False
        )

    def _device_ids(self) -> list[torch.device] | None:
        return [self.world.device] if self.world.device.type == "cuda" else None

    @override
    def _backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        if retain_graph and self.world.size > 1:
            raise UnsupportedOperationError("backward with retain_graph=True: DDP averages gradients once a forward")
        super()._backward(trained, loss, retain_graph)

    @override
    def _teardown(self) -> None:
        gc.collect()  # DDP and its reducer are cycles, which would keep the process group for a while
