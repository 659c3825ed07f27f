"""Defects of skipping."""

import math
from typing import Any

import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.conformance.saboteurs.stepping import Stepping
from lightrft.strategy import FakeStrategy
from lightrft.strategy.training import gradients
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc, union-attr"


@saboteur("OPT-5")
class AppliesNan(FakeStrategy):
    """A gradient that is not finite is applied."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        gradients.fill_missing(trained.parameters)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        return 1.0


@saboteur("OPT-5", world=2)
class SkipsAlone(PlainStrategy):
    """Only the rank that saw the NaN skips."""

    @override
    def average(self, trained: TrainedModel) -> None:
        gradients.fill_missing(trained.parameters)
        own = [parameter.grad.clone() for parameter in trained.parameters]
        for parameter in trained.parameters:
            parameter.grad = parameter.grad.nan_to_num(0.0, 0.0, 0.0)
        super().average(trained)
        for parameter, gradient in zip(trained.parameters, own, strict=True):
            if not gradient.isfinite().all():
                parameter.grad = gradient


@saboteur("OPT-5")
class SkipMovesSchedule(Stepping):
    """A skipped update moves the schedule."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        result = self.straight(optimizer, model, scheduler, boundary)
        if result.skipped and scheduler is not None:
            scheduler.step()
        return result


@saboteur("OPT-5")
class KeepsTheBadGradient(FakeStrategy):
    """A skipped update does not clear the gradient."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        kept = [None if p.grad is None else p.grad.clone() for p in trained.parameters]
        norm = super()._update(trained, factor)
        if not math.isfinite(norm):
            for parameter, gradient in zip(trained.parameters, kept, strict=True):
                parameter.grad = None if gradient is None else gradient.nan_to_num(1.0, 1.0, -1.0)
        return norm


@saboteur("OPT-5")
class SkipsInFullPrecisionOnly(FakeStrategy):
    """In bf16 a gradient that is not finite counts as zero."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        if self.config.bf16:
            for parameter in trained.parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad.nan_to_num(0.0, 0.0, 0.0)
        return super()._update(trained, factor)


@saboteur("OPT-5")
class FiniteButHuge(FakeStrategy):
    """A finite gradient whose norm is not counts as clipped to nothing."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained.parameters)
        norm = gradients.global_norm(self._gradient_shards(trained)).item()
        return (
            super()._update(trained, 0.0 if finite and not math.isfinite(norm) else factor)
            if not (finite and not math.isfinite(norm))
            else self._clip_to_nothing(trained)
        )

    def _clip_to_nothing(self, trained: TrainedModel) -> float:
        for parameter in trained.parameters:
            parameter.grad = torch.zeros_like(parameter)
        return super()._update(trained, 1.0)


@saboteur("OPT-5")
class SkipCountsAsStep(FakeStrategy):
    """A skipped update moves Adam's step counter."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        norm = super()._update(trained, factor)
        if not math.isfinite(norm):
            for state in trained.optimizer.state.values():
                state["step"] += 1
        return norm


@saboteur("OPT-15")
class SkipsForEver(FakeStrategy):
    """A run of skips never ends the training."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        norm = super()._update(trained, factor)
        trained.skipped_in_a_row = 0
        return norm


@saboteur("OPT-15")
class CountsAllSkips(FakeStrategy):
    """Skips are counted, not skips in a row."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        norm = super()._update(trained, factor)
        trained.skipped_in_a_row = trained.skipped
        return norm


@saboteur("OPT-15")
class OffloadForgetsSkips(FakeStrategy):
    """Offloading the optimizer begins a new run of skips."""

    @override
    def _move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        super()._move_optimizer(trained, device)
        trained.skipped_in_a_row = 0
