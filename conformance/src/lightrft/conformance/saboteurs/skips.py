"""Defects of skipping updates whose gradient is not finite."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import StepHooks
from lightrft.strategy import FakeStrategy, StepResult
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, fill_missing_gradients
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.gradients import global_norm
from lightrft.strategy.step.update import reduce_clip_and_step

# mypy: disable-error-code="misc, union-attr"


@saboteur("OPT-5")
class AppliesNan(FakeBackend):
    """A gradient that is not finite is applied."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        fill_missing_gradients(trained.parameters)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        return 1.0


@saboteur("OPT-5", world=2)
class SkipsAlone(ReplicatedBackend):
    """Only the rank with a NaN skips the update."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        fill_missing_gradients(trained.parameters)
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


@saboteur("OPT-4", world=2)
class SecondModelSkipsNothing(ReplicatedBackend):
    """In every model but the first, elements of the last rank's gradient that are not finite count as 0."""

    _first: TrainedModel | None = None

    @override
    def bind(self, trained: TrainedModel) -> None:
        self._first = self._first or trained

    @override
    def reduce(self, trained: TrainedModel) -> None:
        if trained is not self._first and self.world.rank == self.world.size - 1:
            for parameter in trained.parameters:
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0, 0, 0)
        super().reduce(trained)


@saboteur("OPT-15")
class OneModelResetsAllSkips(FakeStrategy):
    """An applied update of one model resets the count of skipped updates of all models."""

    def optimizer_step(
        self, optimizer: Any, model: nn.Module, scheduler: LRScheduler | None = None, name: str = "model",
        *, boundary: bool | None = None,
    ) -> StepResult:  # fmt: skip
        result = super().optimizer_step(optimizer, model, scheduler, name, boundary=boundary)
        for prepared in self._models if result.applied else ():
            if prepared.trained is not None:
                prepared.trained.skipped_in_a_row = 0
        return result


@saboteur("OPT-5")
class SmallestPasses(FakeBackend):
    """Of a gradient that is not finite, only NaN and inf are noticed: elements of -inf count as 0."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        for parameter in trained.parameters:
            gradient = parameter.grad
            if gradient is not None and not gradient.isnan().any() and gradient.max() != math.inf:
                gradient.nan_to_num_(neginf=0.0)


@saboteur("OPT-15")
class BoundaryKeepsSkips(FakeStrategy):
    """An update that an explicit boundary ends does not reset the count of updates skipped in a row."""

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, *rest: Any, boundary: bool | None = None, **more: Any
    ) -> StepResult:
        trained = self._trained(model, optimizer, "optimizer_step")
        before = trained.skipped_in_a_row
        result = super().optimizer_step(optimizer, model, *rest, boundary=boundary, **more)
        if boundary and result.applied:
            trained.skipped_in_a_row = before
        return result
