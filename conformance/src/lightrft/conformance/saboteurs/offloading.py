"""Defects of offloading models and optimizers."""

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import TrainedModel, World
from lightrft.strategy.fake_strategy import FakeBackend

# mypy: disable-error-code="misc"


@saboteur("OFF-1")
class RoundsState(FakeBackend):
    """Moving the optimizer's state rounds its first moments to bf16."""

    @override
    def move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        super().move_optimizer(trained, device)
        for state in trained.optimizer.state.values():
            state["exp_avg"].copy_(state["exp_avg"].bfloat16())


@saboteur("OFF-1")
class ForgetsState(FakeStrategy):
    """Offloading an optimizer twice clears its state."""

    def maybe_offload_optimizer(self, optimizer: Optimizer) -> Optimizer:
        prepared = self._models.owner(optimizer)
        if prepared is not None and prepared.trained is not None and prepared.trained.optimizer_offloaded:
            optimizer.state.clear()
        return super().maybe_offload_optimizer(optimizer)


@saboteur("OFF-2")
class ResetsSteps(FakeBackend):
    """Reloading the optimizer sets Adam's step count to 0."""

    @override
    def move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        super().move_optimizer(trained, device)
        for state in trained.optimizer.state.values() if trained.optimizer_offloaded else ():
            state["step"].zero_()


@saboteur("OFF-2")
class LosesGradients(FakeBackend):
    """Moving a model sets its optimizer's first moments to 0."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._trained: list[TrainedModel] = []

    @override
    def bind(self, trained: TrainedModel) -> None:
        self._trained.append(trained)

    @override
    def move_model(self, module: nn.Module, device: torch.device) -> None:
        super().move_model(module, device)
        for trained in self._trained:
            for state in trained.optimizer.state.values() if trained.model is module else ():
                state["exp_avg"].zero_()


@saboteur("OFF-2")
class OffloadForgetsGradients(FakeBackend):
    """Moving a model drops its pending gradient."""

    @override
    def move_model(self, module: nn.Module, device: torch.device) -> None:
        for parameter in module.parameters():
            parameter.grad = None
        super().move_model(module, device)
