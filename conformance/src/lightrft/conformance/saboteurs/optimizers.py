"""Defects of schedules, decay and numbers."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.stepping import Stepping
from lightrft.strategy import FakeStrategy
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc"


@saboteur("OPT-6")
class NeedsSchedule(Stepping):
    """scheduler=None is an error."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        result = self.straight(optimizer, model, None, boundary)
        if result.applied:
            scheduler.step()
        return result


@saboteur("OPT-6")
class SchedulesTwice(Stepping):
    """The schedule moves twice an update."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        result = self.straight(optimizer, model, scheduler, boundary)
        if result.applied and scheduler is not None:
            scheduler.step()
        return result


@saboteur("OPT-7")
class DecaysEverything(FakeStrategy):
    """Weight decay does not spare biases and norms."""

    @override
    def _create_optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], **settings)


@saboteur("OPT-7")
class DecaysTheFrozenGiven(FakeStrategy):
    """What is frozen decays, where the optimizer was given it."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        frozen = [p for group in trained.optimizer.param_groups for p in group["params"] if not p.requires_grad]
        for parameter in frozen:
            parameter.grad = torch.zeros_like(parameter)
        return super()._update(trained, factor)


@saboteur("OPT-7")
class LeavesTheUnused(FakeStrategy):
    """A parameter that got no gradient does not decay."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        unused = [(p, p.detach().clone()) for p in trained.parameters if p.grad is None]
        norm = super()._update(trained, factor)
        for parameter, value in unused:
            parameter.data.copy_(value)
        return norm


@saboteur("OPT-7")
class DecaysTheFrozen(FakeStrategy):
    """Frozen parameters decay."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        norm = super()._update(trained, factor)
        for parameter in trained.model.parameters():
            if not parameter.requires_grad:
                parameter.data.mul_(0.999)
        return norm


@saboteur("OPT-8")
class AnotherEpsilon(FakeStrategy):
    """The optimizer has another epsilon."""

    @override
    def _create_optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        return super()._create_optimizer(module, **{"eps": 1e-6, **settings})


@saboteur("OPT-8")
class FromTheThirdStep(FakeStrategy):
    """From the third update on the gradient is a little larger."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        for parameter in trained.parameters:
            if trained.updates >= 2 and parameter.grad is not None and parameter.ndim == 1:
                parameter.grad.add_(1e-3)
        return super()._update(trained, factor)


@saboteur("OPT-8")
class OneValueInFifty(FakeStrategy):
    """One element in fifty of a gradient is lost."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        for parameter in trained.parameters:
            if parameter.grad is not None:
                parameter.grad.view(-1)[::50] = 0
        return super()._update(trained, factor)


@saboteur("OPT-17")
class FasterInHalf(FakeStrategy):
    """In bf16 the learning rate is half as large again."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        if not self.config.bf16:
            return super()._update(trained, factor)
        rates = [group["lr"] for group in trained.optimizer.param_groups]
        for group in trained.optimizer.param_groups:
            group["lr"] *= 1.5
        norm = super()._update(trained, factor)
        for group, rate in zip(trained.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return norm


@saboteur("OPT-9")
class KeepsGradients(FakeStrategy):
    """A tenth of the gradient stays for the next update."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        kept = [None if p.grad is None else 0.1 * p.grad for p in trained.parameters]
        norm = super()._update(trained, factor)
        for parameter, gradient in zip(trained.parameters, kept, strict=True):
            parameter.grad = gradient
        return norm


@saboteur("OPT-10")
class NoMasters(FakeStrategy):
    """In bf16 the weights themselves are rounded to bf16."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        norm = super()._update(trained, factor)
        if self.config.bf16:
            for parameter in trained.parameters:
                parameter.data = parameter.data.bfloat16().float()
        return norm
