"""Defects of schedules, weight decay, hyperparameters and arithmetic."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import StepHooks
from lightrft.strategy import FakeStrategy, StepResult
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, World
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.update import reduce_clip_and_step

# mypy: disable-error-code="misc"


@saboteur("OPT-6")
class NeedsSchedule(StepHooks):
    """scheduler=None is an error."""

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        if result.applied and scheduler is None:
            raise AttributeError("'NoneType' object has no attribute 'step'")


@saboteur("OPT-6")
class SchedulesTwice(StepHooks):
    """The schedule steps twice per update."""

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        if result.applied and scheduler is not None:
            scheduler.step()


@saboteur("OPT-7")
class DecaysEverything(FakeBackend):
    """Weight decay includes biases and norms."""

    @override
    def create_optimizer(self, module: nn.Module, **settings: Any) -> Optimizer:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], **settings)


@saboteur("OPT-7")
class DecaysTheFrozenGiven(FakeBackend):
    """Frozen parameters that the optimizer was given decay."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        for group in trained.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)


@saboteur("OPT-7")
class LeavesTheUnused(FakeBackend):
    """A parameter without a gradient does not decay."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        unused = [(p, p.detach().clone()) for p in trained.parameters if p.grad is None]
        norm = reduce_clip_and_step(self, trained, factor)
        for parameter, value in unused:
            parameter.data.copy_(value)
        return norm


@saboteur("OPT-7")
class DecaysTheFrozen(FakeBackend):
    """All frozen parameters of the model decay."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        for parameter in trained.model.parameters():
            if not parameter.requires_grad:
                parameter.data.mul_(0.999)


@saboteur("OPT-20")
class BetasIgnored(FakeBackend):
    """create_optimizer ignores betas."""

    @override
    def create_optimizer(self, module: nn.Module, **settings: object) -> Optimizer:
        settings.pop("betas", None)
        return super().create_optimizer(module, **settings)


@saboteur("OPT-20")
class EpsIgnored(FakeBackend):
    """create_optimizer ignores eps."""

    @override
    def create_optimizer(self, module: nn.Module, **settings: object) -> Optimizer:
        settings.pop("eps", None)
        return super().create_optimizer(module, **settings)


@saboteur("OPT-20")
class CoupledDecay(FakeBackend):
    """Weight decay is added to the gradient, as in Adam with L2, not applied to the weights, as in AdamW."""

    @override
    def create_optimizer(self, module: nn.Module, **settings: object) -> Optimizer:
        optimizer = super().create_optimizer(module, **settings)
        for group in optimizer.param_groups:
            group["decoupled_weight_decay"] = False
        return optimizer


class FreezesHyperparameter(FakeBackend):
    """A backend that steps with the value that one hyperparameter had when the optimizer was bound."""

    hyperparameter: str

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._bound: dict[TrainedModel, list[Any]] = {}

    @override
    def bind(self, trained: TrainedModel) -> None:
        self._bound[trained] = [group[self.hyperparameter] for group in trained.optimizer.param_groups]

    @override
    def reduce(self, trained: TrainedModel) -> None:
        for group, value in zip(trained.optimizer.param_groups, self._bound[trained], strict=True):
            group[self.hyperparameter] = value


@saboteur("PREP-9")
class DecayNotLive(FreezesHyperparameter):
    """A weight decay that a script changes in param_groups has no effect."""

    hyperparameter = "weight_decay"


@saboteur("PREP-9")
class BetasNotLive(FreezesHyperparameter):
    """Betas that a script changes in param_groups have no effect."""

    hyperparameter = "betas"


@saboteur("PREP-9")
class DeadRates(FreezesHyperparameter):
    """A learning rate that a script changes in param_groups has no effect."""

    hyperparameter = "lr"


@saboteur("OPT-8")
class AnotherEpsilon(FakeBackend):
    """The default epsilon is 1e-6."""

    @override
    def create_optimizer(self, module: nn.Module, **settings: object) -> Optimizer:
        return super().create_optimizer(module, **{"eps": 1e-6, **settings})


@saboteur("OPT-8")
class FromTheThirdStep(FakeBackend):
    """From the third update on, gradients of biases are 1e-3 too large."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        for parameter in trained.parameters:
            if trained.updates >= 2 and parameter.grad is not None and parameter.ndim == 1:
                parameter.grad.add_(1e-3)


@saboteur("OPT-8")
class OneValueInFifty(FakeBackend):
    """One element in fifty of each gradient is 0."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        for parameter in trained.parameters:
            if parameter.grad is not None:
                parameter.grad.view(-1)[::50] = 0


@saboteur("OPT-17")
class HigherRateInBf16(FakeBackend):
    """With bf16, the learning rate is multiplied by 1.5."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        scale = 1.5 if self.config.bf16 else 1.0
        rates = [group["lr"] for group in trained.optimizer.param_groups]
        for group in trained.optimizer.param_groups:
            group["lr"] *= scale
        norm = reduce_clip_and_step(self, trained, factor)
        for group, rate in zip(trained.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return norm


@saboteur("OPT-22")
class AccumulatesInHalf(FakeBackend):
    """With bf16, gradients are accumulated in bf16."""

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        super().backward(trained, loss, retain_graph=retain_graph)
        for parameter in trained.parameters if self.config.bf16 else ():
            if parameter.grad is not None:
                parameter.grad.copy_(parameter.grad.bfloat16())


@saboteur("OPT-22", world=2)
class ReducesInHalf(ReplicatedBackend):
    """With bf16, gradients are averaged over the ranks in bf16."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        if not self.config.bf16:
            super().reduce(trained)
            return
        for parameter in trained.parameters:
            assert parameter.grad is not None
            half = parameter.grad.bfloat16()
            torch.distributed.all_reduce(half, group=self.world.device_group)
            parameter.grad.copy_(half / self.world.size)


@saboteur("OPT-9")
class KeepsGradients(FakeBackend):
    """A tenth of the gradient stays for the next update."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        kept = [None if p.grad is None else 0.1 * p.grad for p in trained.parameters]
        norm = reduce_clip_and_step(self, trained, factor)
        for parameter, gradient in zip(trained.parameters, kept, strict=True):
            parameter.grad = gradient
        return norm


@saboteur("OPT-10")
class NoMasters(FakeBackend):
    """With bf16, there are no fp32 master weights: weights are rounded to bf16 after each update."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        norm = reduce_clip_and_step(self, trained, factor)
        if self.config.bf16:
            for parameter in trained.parameters:
                parameter.data = parameter.data.bfloat16().float()
        return norm


@saboteur("OPT-6")
class SchedulesTheSecondSkip(FakeStrategy):
    """The schedule steps at the second skipped update in a row."""

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any = None, *arguments: Any, **more: Any) -> Any:
        result = super().optimizer_step(optimizer, model, scheduler, *arguments, **more)
        trained = self._trained(model, optimizer, "optimizer_step")
        if result.skipped and scheduler is not None and trained.skipped_in_a_row == 2:
            scheduler.step()
        return result


@saboteur("OPT-7")
class FrozenDecay(FakeBackend):
    """Parameters that are frozen after preparing still decay."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        frozen = [parameter for parameter in trained.parameters if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            return reduce_clip_and_step(self, trained, factor)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


@saboteur("OPT-6")
class EarlyUpdatesKeepTheRate(FakeStrategy):
    """The schedule does not step with an update of fewer than K micro-batches."""

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: Any = None, *rest: Any, **more: Any
    ) -> StepResult:
        early = self._trained(model, optimizer, "optimizer_step").micro_batches + 1 < self.accumulated_gradient
        return super().optimizer_step(optimizer, model, None if early else scheduler, *rest, **more)
