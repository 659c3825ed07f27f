"""What users of such layers complain of: settings that are ignored, models in the wrong mode, copies, side effects."""

import copy
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc"


@saboteur("OPT-20")
class BetasIgnored(FakeStrategy):
    """create_optimizer ignores betas."""

    @override
    def _create_optimizer(self, module: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        settings.pop("betas", None)
        return super()._create_optimizer(module, **settings)


@saboteur("OPT-20")
class EpsIgnored(FakeStrategy):
    """create_optimizer ignores eps."""

    @override
    def _create_optimizer(self, module: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        settings.pop("eps", None)
        return super()._create_optimizer(module, **settings)


@saboteur("OPT-20")
class CoupledDecay(FakeStrategy):
    """Weight decay goes into the gradient, as in Adam, and not beside it, as in AdamW."""

    @override
    def _create_optimizer(self, module: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        optimizer = super()._create_optimizer(module, **settings)
        for group in optimizer.param_groups:
            group["decoupled_weight_decay"] = False
        return optimizer


@saboteur("PREP-9")
class DecayNotLive(FakeStrategy):
    """A weight decay that a script changes in param_groups has no effect."""

    @override
    def _bind(self, trained: TrainedModel) -> None:
        super()._bind(trained)
        self._decays = [group["weight_decay"] for group in trained.optimizer.param_groups]

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        for group, decay in zip(trained.optimizer.param_groups, self._decays, strict=True):
            group["weight_decay"] = decay
        return super()._update(trained, factor)


@saboteur("OPT-21")
class GraphFreed(FakeStrategy):
    """backward frees the graph, whatever retain_graph says."""

    @override
    def _backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        loss.backward()


@saboteur("PREP-10")
class DropoutInTheReference(FakeStrategy):
    """Models prepared for inference stay in training mode."""

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        return super()._wrap(module, options).train()


@saboteur("PREP-10")
class NoDropoutInTraining(FakeStrategy):
    """Looking at the weights of a model in training leaves it in evaluation mode."""

    @override
    def _settle(self, module: nn.Module) -> None:
        module.eval()


@saboteur("PREP-3")
class KeywordsDropped(FakeStrategy):
    """The wrapped model forgets the keywords that it is called with."""

    adopts = False
    capabilities = frozenset({"uneven_modules"})

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        return Deaf(super()._wrap(module, options))


class Deaf(nn.Module):
    """Calls what it wraps with positional arguments only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.module(*arguments)


@saboteur("PREP-2")
class UnwrapCopies(FakeStrategy):
    """unwrap_model gives a copy, which training does not change."""

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(super().unwrap_model(model))


@saboteur("OFF-2")
class OffloadForgetsGradients(FakeStrategy):
    """Offloading a model throws the pending gradient away."""

    @override
    def _move_model(self, module: nn.Module, device: torch.device) -> None:
        for parameter in module.parameters():
            parameter.grad = None
        super()._move_model(module, device)


@saboteur("LIFE-9")
class DefaultDtypeLeft(FakeStrategy):
    """close leaves torch's default dtype at bfloat16."""

    @override
    def _teardown(self) -> None:
        torch.set_default_dtype(torch.bfloat16)


@saboteur("LIFE-9")
class DrawsInAStep(FakeStrategy):
    """Each update draws a number from torch's random stream."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        torch.rand(1)
        return super()._update(trained, factor)
