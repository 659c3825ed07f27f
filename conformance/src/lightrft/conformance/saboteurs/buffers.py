"""Defects that show only in models with running statistics, 1-D weights, scalars, or parts in evaluation mode."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.checkpoints import Saves
from lightrft.conformance.saboteurs.hooks import CheckpointHooks, Options
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import ReplicatedBackend, StateSlice, TrainedModel, broadcast
from lightrft.strategy.checkpoint.background import BackgroundWriter, Staging
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.fake_strategy import FakeBackend

# mypy: disable-error-code="misc"


@saboteur("PREP-18", world=2)
class SharesBuffers(ReplicatedBackend):
    """Each update copies rank 0's buffers to the other ranks, as DistributedDataParallel does by default."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        for buffer in trained.model.buffers():
            broadcast(buffer, self.world)


@saboteur("PREP-18", world=2)
class AveragesOverRanks(ReplicatedBackend):
    """Reading weights averages floating-point buffers over the ranks."""

    @override
    def reshard(self, module: nn.Module) -> None:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer, group=self.world.device_group)
                buffer /= self.world.size


@saboteur("OPT-19")
class AveragesBuffers(FakeStrategy):
    """A moving average averages buffers too."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: torch.device | str | None = None,
        **more: object,
    ) -> None:  # fmt: skip
        super().moving_average(model, model_ema, beta, device, **more)
        for averaged, buffer in zip(model_ema.buffers(), model.buffers(), strict=True):
            if buffer.is_floating_point():
                averaged.lerp_(buffer, 1 - beta)


@saboteur("CKPT-1", world=2)
class OneSetOfBuffers(CheckpointHooks, PlainStrategy):
    """After loading, every rank has rank 0's buffers."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        for module in model.values() if isinstance(model, Mapping) else [model]:
            for buffer in module.buffers():
                broadcast(buffer, self.backend.world)


@saboteur("CKPT-12")
class SavesLiveBuffers(Saves):
    """An asynchronous save copies parameters and writes buffers as they are later."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        live = {buffer.data_ptr() for buffer in self.module_of(model).buffers()}
        copies, run = Staging.copies, BackgroundWriter._run

        def copies_of_parameters(staging: Staging, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            copied = copies(staging, tensors)
            return [tensor if tensor.data_ptr() in live else copy for tensor, copy in zip(tensors, copied, strict=True)]

        def run_later(background: BackgroundWriter, *arguments: Any) -> None:
            time.sleep(0.3)
            run(background, *arguments)

        with patch.object(Staging, "copies", copies_of_parameters), patch.object(BackgroundWriter, "_run", run_later):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-1")
class ForgetsScalars(FakeBackend):
    """The optimizer's state of parameters of one element is not in the checkpoint."""

    @override
    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        return [state_slice for state_slice in super().state_slices(trained) if state_slice.shard.shape.numel() > 1]


@saboteur("OPT-7")
class DecaysByShape(FakeBackend):
    """Weight decay skips all 1-D parameters, whatever their names."""

    @override
    def create_optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        decay = settings.pop("weight_decay", 0.0)
        matrices, others = ([p for p in trainable if (p.ndim > 1) == wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, **settings)


@saboteur("PREP-10")
class FlattensModes(FakeBackend):
    """Reading weights puts every submodule in the mode of the model itself."""

    @override
    def reshard(self, module: nn.Module) -> None:
        module.train(module.training)


@saboteur("PREP-10")
class TrainsEveryPart(FakeBackend):
    """Each update puts every part of the model in training mode."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        trained.model.train()
