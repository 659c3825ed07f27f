"""ZeRO-0: every rank holds everything, and gradients are averaged once an update."""

import torch
from torch import nn
from typing_extensions import override

from lightrft.deepspeed.stages import Stage
from lightrft.strategy import flat
from lightrft.strategy.shards import Shard
from lightrft.strategy.training.trained_model import TrainedModel


class Replicated(Stage):
    """Stage 0. DeepSpeed reduces the gradients; the update is the base's.

    DeepSpeed's own, in fp32, applies gradients that are not finite, and tells no norm (0.19.8).
    """

    @property
    @override
    def capabilities(self) -> frozenset[str]:
        return frozenset({"uneven_modules"})

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        loss.backward(retain_graph=retain_graph)

    @override
    def update(self, trained: TrainedModel, factor: float) -> float | None:
        self.engines[trained.model].buffered_allreduce_fallback()
        return None

    @override
    def shards(self, module: nn.Module) -> list[Shard]:
        return [
            Shard(name=name, shape=parameter.shape, offset=0, values=flat.elements(parameter))
            for name, parameter in module.named_parameters()
        ]
