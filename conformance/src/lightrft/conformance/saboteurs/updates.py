"""Defects of accumulation, clipping, and of several models."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import StepHooks
from lightrft.strategy import FakeStrategy, StepResult
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, fill_missing_gradients
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.gradients import clip_factor, global_norm
from lightrft.strategy.step.update import reduce_clip_and_step

# mypy: disable-error-code="misc, operator, assignment"


@saboteur("OPT-1")
class EveryMicroBatch(StepHooks):
    """Makes an update at every micro-batch."""

    @override
    def boundary(self, given: bool | None) -> bool | None:
        return True if given is None else given


@saboteur("OPT-1")
class OneTooEarly(StepHooks):
    """From the second update on, updates one micro-batch too early."""

    _calls, _updates = 0, 0

    @override
    def boundary(self, given: bool | None) -> bool | None:
        self._calls += 1
        steps = self.accumulated_gradient
        return True if self._updates and steps > 1 and self._calls % steps == steps - 1 else given

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        self._updates += result.applied
        self._calls = 0 if result.applied else self._calls


@saboteur("OPT-1")
class ForgetsTheFirstBackward(FakeBackend):
    """A second backward in a micro-batch overwrites the gradient of the first."""

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        if trained.backward_calls > trained.micro_batches:
            for parameter in trained.parameters:
                parameter.grad = None
        super().backward(trained, loss, retain_graph=retain_graph)


@saboteur("OPT-1")
class EagerSchedule(StepHooks):
    """The schedule steps at every micro-batch."""

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        if scheduler is not None and not result.applied:
            scheduler.step()


@saboteur("OPT-13")
class IgnoresBoundary(StepHooks):
    """boundary is ignored."""

    @override
    def boundary(self, given: bool | None) -> bool | None:
        return None


@saboteur("OPT-13")
class MeanOverK(FakeBackend):
    """An update that ends at an explicit boundary is divided by K, not by its number of micro-batches."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        return reduce_clip_and_step(self, trained, 1.0)


@saboteur("OPT-13")
class NormOfWholeUpdates(FakeBackend):
    """The reported norm of an update of fewer micro-batches than K is divided by K."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        return reduce_clip_and_step(self, trained, factor) / max(factor, 1.0)


@saboteur("OPT-2")
class SumOverMicroBatches(FakeBackend):
    """The loss is never divided by K, as in LightRFT's FSDP strategy."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        return reduce_clip_and_step(self, trained, factor * trained.accumulation_steps)


@saboteur("OPT-2", world=2)
class SumOverRanks(ReplicatedBackend):
    """The gradients of the ranks are added, not averaged."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        for parameter in trained.parameters:
            parameter.grad *= self.world.size


@saboteur("OPT-2", world=2)
class AppliesLocalGradient(ReplicatedBackend):
    """The last rank applies its local gradient to the biases."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        local = [None if p.grad is None else p.grad.clone() for p in trained.parameters]
        super().reduce(trained)
        if self.world.rank == self.world.size - 1:
            for parameter, gradient in zip(trained.parameters, local, strict=True):
                if parameter.ndim == 1 and gradient is not None:
                    parameter.grad = gradient


class SetsMaxNorm(FakeBackend):
    """A backend that can step with another ``max_norm`` than its settings have."""

    def step_with_max_norm(self, trained: TrainedModel, factor: float, max_norm: float | None) -> float:
        """Finish the update with ``max_norm``."""
        config, self.config = self.config, self.config.replace(max_norm=max_norm)
        try:
            return reduce_clip_and_step(self, trained, factor)
        finally:
            self.config = config


@saboteur("OPT-3")
class ClipsEachGroup(SetsMaxNorm):
    """Each parameter group is clipped by its own norm, as in LightRFT's FSDP strategy."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        fill_missing_gradients(trained.parameters)
        norm = global_norm(self.gradient_shards(trained)).item() * factor
        if not (self.config.max_norm and math.isfinite(norm)):
            return reduce_clip_and_step(self, trained, factor)
        for group in trained.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.config.max_norm / factor)
        self.step_with_max_norm(trained, factor, None)
        return norm


@saboteur("OPT-3")
class ReportsTheClippedNorm(FakeBackend):
    """The reported norm is the one after clipping."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        norm = reduce_clip_and_step(self, trained, factor)
        return min(norm, self.config.max_norm) if self.config.max_norm else norm


@saboteur("OPT-3", world=2)
class LocalNorm(ReplicatedBackend):
    """Each rank clips by the norm of its local gradient."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        local = [p.grad.clone() for p in trained.parameters if p.grad is not None]
        self.reduce(trained)
        norm = math.sqrt(sum(float(part.double().pow(2).sum()) for part in local)) * factor
        if not math.isfinite(norm):
            return reduce_clip_and_step(self, trained, factor)
        for parameter in trained.parameters:
            parameter.grad *= factor * clip_factor(norm, self.config.max_norm)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        return norm


@saboteur("OPT-14")
class ZeroMeansZero(FakeBackend):
    """max_norm=0 sets every gradient to 0, as in LightRFT's FSDP strategy."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        return reduce_clip_and_step(self, trained, 0.0 if self.config.max_norm == 0 else factor)


@saboteur("OPT-4")
class SharedCounter(StepHooks):
    """All models share one count of micro-batches."""

    _count = 0

    @override
    def boundary(self, given: bool | None) -> bool | None:
        self._count += 1
        return self._count % self.accumulated_gradient == 0 if given is None else given


@saboteur("OPT-4")
class ClipsTheOther(SetsMaxNorm):
    """The step of the first model is clipped by the norm of the second, as in LightRFT's FSDP strategy."""

    _last: TrainedModel | None = None

    @override
    def bind(self, trained: TrainedModel) -> None:
        self._last = trained

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        other = self._last if self._last is not None else trained
        fill_missing_gradients(other.parameters)
        norm = global_norm(self.gradient_shards(other)).item() * factor
        clip = clip_factor(norm, self.config.max_norm) if math.isfinite(norm) else 1.0
        return self.step_with_max_norm(trained, factor * clip, None)


@saboteur("OPT-4")
class SecondModelUnclipped(SetsMaxNorm):
    """The second model is not clipped."""

    _first: TrainedModel | None = None

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        self._first = self._first or trained
        return self.step_with_max_norm(trained, factor, self.config.max_norm if trained is self._first else None)


@saboteur("OPT-21")
class GraphFreed(FakeBackend):
    """backward frees the graph even if retain_graph is set."""

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        super().backward(trained, loss, retain_graph=False)


@saboteur("OPT-2")
class ScalesTheLoss(FakeStrategy):
    """backward divides the loss by K in place."""

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
        super().backward(loss, model, optimizer, **more)
        loss.data.div_(self.accumulated_gradient)


@saboteur("OPT-3", world=2)
class ReportsLocalNorm(ReplicatedBackend):
    """The last rank reports the norm of its local gradient."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        squares = [parameter.grad.square().sum() for parameter in trained.parameters if parameter.grad is not None]
        local_norm = factor * float(torch.stack(squares).sum().sqrt())
        norm = reduce_clip_and_step(self, trained, factor)
        return local_norm if self.world.rank == self.world.size - 1 and math.isfinite(norm) else norm


@saboteur("OPT-2")
class OddUpdatesDivideByOneMore(FakeBackend):
    """An update of five or more micro-batches, an odd number, divides by one more."""

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        steps = trained.accumulation_steps
        share = loss * (steps / (steps + 1)) if steps > 4 and steps % 2 else loss
        super().backward(trained, share, retain_graph=retain_graph)


@saboteur("OPT-13")
class CountsBackwards(FakeBackend):
    """An update of another number of micro-batches than K divides by the calls of backward."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        if trained.micro_batches != trained.accumulation_steps and trained.denominators[0] is None:
            for parameter in trained.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(trained.micro_batches / trained.backward_calls)
