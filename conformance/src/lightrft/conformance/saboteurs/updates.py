"""Defects of accumulation, clipping, and of several models."""

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

# mypy: disable-error-code="misc, operator, assignment"


@saboteur("OPT-1")
class EveryMicroBatch(Stepping):
    """Makes an update at every micro-batch."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        return self.straight(optimizer, model, scheduler, True if boundary is None else boundary)


@saboteur("OPT-1")
class OneTooEarly(Stepping):
    """From the second update on, updates one micro-batch too early."""

    _calls, _updates = 0, 0

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        self._calls += 1
        window = self.accumulated_gradient
        early = self._updates and window > 1 and self._calls % window == window - 1
        result = self.straight(optimizer, model, scheduler, True if early else boundary)
        self._updates += result.applied
        self._calls = 0 if result.applied else self._calls
        return result


@saboteur("OPT-1")
class ForgetsTheFirstBackward(FakeStrategy):
    """A second backward in a micro-batch overwrites the first."""

    @override
    def _backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        if trained.backwards > trained.micro_batches:
            for parameter in trained.parameters:
                parameter.grad = None
        super()._backward(trained, loss, retain_graph)


@saboteur("OPT-1")
class EagerSchedule(Stepping):
    """The schedule moves at every micro-batch."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        result = self.straight(optimizer, model, None, boundary)
        if scheduler is not None:
            scheduler.step()
        return result


@saboteur("OPT-13")
class IgnoresBoundary(Stepping):
    """boundary is ignored."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        return self.straight(optimizer, model, scheduler, None)


@saboteur("OPT-13")
class MeanOverK(FakeStrategy):
    """A window that an explicit boundary ended is divided by K, not by its length."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        return super()._update(trained, 1.0)


@saboteur("OPT-2")
class SumOverMicroBatches(FakeStrategy):
    """The loss is never divided by K: LightRFT's FSDP."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        return super()._update(trained, factor * trained.window)


@saboteur("OPT-2", world=2)
class SumOverRanks(PlainStrategy):
    """The gradients of the ranks are added, not averaged."""

    @override
    def average(self, trained: TrainedModel) -> None:
        super().average(trained)
        for parameter in trained.parameters:
            parameter.grad *= self.world.size


@saboteur("OPT-2", world=2)
class OwnGradient(PlainStrategy):
    """The last rank applies its own gradient to the biases."""

    @override
    def average(self, trained: TrainedModel) -> None:
        own = [p.grad.clone() if p.grad is not None else None for p in trained.parameters]
        super().average(trained)
        if self.world.rank == self.world.size - 1:
            for parameter, gradient in zip(trained.parameters, own, strict=True):
                if parameter.ndim == 1 and gradient is not None:
                    parameter.grad = gradient


@saboteur("OPT-3")
class ClipsEachGroup(FakeStrategy):
    """Each parameter group is clipped on its own: LightRFT's FSDP."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        gradients.fill_missing(trained.parameters)
        shards = self._gradient_shards(trained)
        norm = gradients.global_norm(shards).item() * factor
        if self.config.max_norm and math.isfinite(norm):
            for group in trained.optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], self.config.max_norm / factor)
            limit, self.config = self.config, self.config.replace(max_norm=None)
            try:
                super()._update(trained, factor)
            finally:
                self.config = limit
            return norm
        return super()._update(trained, factor)


@saboteur("OPT-3")
class ReportsTheClippedNorm(FakeStrategy):
    """The norm that is reported is the one after clipping."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        norm = super()._update(trained, factor)
        return min(norm, self.config.max_norm) if self.config.max_norm else norm


@saboteur("OPT-3", world=2)
class LocalNorm(PlainStrategy):
    """Each rank clips by a norm of its own."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        own = [p.grad.clone() for p in trained.parameters if p.grad is not None]
        self.average(trained)
        norm = math.sqrt(sum(float(part.double().pow(2).sum()) for part in own)) * factor
        if not math.isfinite(norm):
            return FakeStrategy._update(self, trained, factor)
        for parameter in trained.parameters:
            parameter.grad *= factor * gradients.clip_factor(norm, self.config.max_norm)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        return norm


@saboteur("OPT-14")
class ZeroMeansZero(FakeStrategy):
    """max_norm=0 zeroes every gradient: LightRFT's FSDP."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        return super()._update(trained, 0.0 if self.config.max_norm == 0 else factor)


@saboteur("OPT-4")
class SharedCounter(Stepping):
    """All models share one count of micro-batches."""

    _count = 0

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        self._count += 1
        return self.straight(
            optimizer, model, scheduler, self._count % self.accumulated_gradient == 0 if boundary is None else boundary
        )


@saboteur("OPT-4")
class ClipsTheOther(FakeStrategy):
    """A second optimizer makes the first model's step clip the second: LightRFT's FSDP."""

    _last: TrainedModel | None = None

    @override
    def _bind(self, trained: TrainedModel) -> None:
        self._last = trained

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        other = self._last if self._last is not None else trained
        gradients.fill_missing(other.parameters)
        norm = gradients.global_norm(self._gradient_shards(other)).item() * factor
        own, self.config = self.config, self.config.replace(max_norm=None)
        try:
            return super()._update(
                trained, factor * (gradients.clip_factor(norm, own.max_norm) if math.isfinite(norm) else 1.0)
            )
        finally:
            self.config = own


@saboteur("OPT-4")
class SecondModelUnclipped(FakeStrategy):
    """The second model is not clipped."""

    _first: TrainedModel | None = None

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        self._first = self._first or trained
        if trained is self._first:
            return super()._update(trained, factor)
        own, self.config = self.config, self.config.replace(max_norm=None)
        try:
            return super()._update(trained, factor)
        finally:
            self.config = own
