"""Defects of skipping updates whose gradient is not finite."""

import math

import torch
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import StepHooks
from lightrft.strategy import StepResult
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, fill_missing
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.gradients import global_norm
from lightrft.strategy.step.update import reduce_clip_and_step

# mypy: disable-error-code="misc, union-attr"


@saboteur("OPT-5")
class AppliesNan(FakeBackend):
    """A gradient that is not finite is applied."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        fill_missing(trained.parameters)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        return 1.0


@saboteur("OPT-5", world=2)
class SkipsAlone(ReplicatedBackend):
    """Only the rank with a NaN skips the update."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        fill_missing(trained.parameters)
        local = [parameter.grad.clone() for parameter in trained.parameters]
        for parameter in trained.parameters:
            parameter.grad = parameter.grad.nan_to_num(0.0, 0.0, 0.0)
        super().reduce(trained)
        for parameter, gradient in zip(trained.parameters, local, strict=True):
            if not gradient.isfinite().all():
                parameter.grad = gradient


@saboteur("OPT-5")
class SkipMovesSchedule(StepHooks):
    """A skipped update steps the schedule."""

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        if result.skipped and scheduler is not None:
            scheduler.step()


@saboteur("OPT-5")
class KeepsTheBadGradient(FakeBackend):
    """A skipped update does not clear the gradient."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        kept = [None if p.grad is None else p.grad.clone() for p in trained.parameters]
        norm = reduce_clip_and_step(self, trained, factor)
        if not math.isfinite(norm):
            for parameter, gradient in zip(trained.parameters, kept, strict=True):
                parameter.grad = None if gradient is None else gradient.nan_to_num(1.0, 1.0, -1.0)
        return norm


@saboteur("OPT-5")
class SkipsInFullPrecisionOnly(FakeBackend):
    """With bf16, elements of a gradient that are not finite count as 0."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        for parameter in trained.parameters if self.config.bf16 else ():
            parameter.grad = None if parameter.grad is None else parameter.grad.nan_to_num(0.0, 0.0, 0.0)


@saboteur("OPT-5")
class FiniteButHuge(FakeBackend):
    """A gradient of finite elements whose norm overflows is clipped to 0 and applied, not skipped."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained.parameters)
        if finite and not math.isfinite(global_norm(self.gradient_shards(trained)).item()):
            for parameter in trained.parameters:
                parameter.grad = torch.zeros_like(parameter)


@saboteur("OPT-5")
class SkipCountsAsStep(FakeBackend):
    """A skipped update increments Adam's step count."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        norm = reduce_clip_and_step(self, trained, factor)
        if not math.isfinite(norm):
            for state in trained.optimizer.state.values():
                state["step"] += 1
        return norm


@saboteur("OPT-15")
class NoSkipLimit(FakeBackend):
    """max_skipped_updates is never reached."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        trained.skipped_in_a_row = 0


@saboteur("OPT-15")
class CountsAllSkips(FakeBackend):
    """max_skipped_updates counts all skipped updates, not those in a row."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        trained.skipped_in_a_row = trained.skipped


@saboteur("OPT-15")
class OffloadForgetsSkips(FakeBackend):
    """Offloading the optimizer resets the count of updates skipped in a row."""

    @override
    def move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        super().move_optimizer(trained, device)
        trained.skipped_in_a_row = 0
