"""Defects of gradients and updates."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy, StepResult
from lightrft.strategy.training import gradients
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc"


class Stepping(FakeStrategy):
    """A strategy whose optimizer_step is easy to bend."""

    def optimizer_step(
        self, optimizer: Any, model: Any, scheduler: Any = None, name: str = "model", *, boundary: Any = None
    ) -> Any:
        return self.bent(optimizer, model, scheduler, boundary)

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        """The step as it is."""
        return self.straight(optimizer, model, scheduler, boundary)

    def straight(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> StepResult:
        """The step as it should be."""
        return super().optimizer_step(optimizer, model, scheduler, boundary=boundary)


# Accumulation


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
            parameter.grad *= self.world.size  # type: ignore[operator]


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


# Clipping


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
            return FakeStrategy._update(self, trained, factor)  # type: ignore[arg-type]
        for parameter in trained.parameters:
            parameter.grad *= factor * gradients.clip_factor(norm, self.config.max_norm)  # type: ignore[operator]
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        return norm


@saboteur("OPT-14")
class ZeroMeansZero(FakeStrategy):
    """max_norm=0 zeroes every gradient: LightRFT's FSDP."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        return super()._update(trained, 0.0 if self.config.max_norm == 0 else factor)


# Several models


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


# Skipping


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
        own = [parameter.grad.clone() for parameter in trained.parameters]  # type: ignore[union-attr]
        for parameter in trained.parameters:
            parameter.grad = parameter.grad.nan_to_num(0.0, 0.0, 0.0)  # type: ignore[union-attr]
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


# Schedules, decay


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


# Numbers


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


# Misuse, results, capabilities


@saboteur("OPT-11")
class TakesVectors(FakeStrategy):
    """A loss that is no scalar is averaged."""

    def backward(self, loss: Any, model: Any, optimizer: Any, *, retain_graph: bool = False) -> None:
        super().backward(loss.mean() if isinstance(loss, torch.Tensor) and loss.ndim else loss, model, optimizer)


@saboteur("OPT-11")
class TakesAnyOptimizer(FakeStrategy):
    """backward does not look at the optimizer."""

    def backward(self, loss: Any, model: Any, optimizer: Any, *, retain_graph: bool = False) -> None:
        found = self._models.find(model)
        own = found.trained.optimizer if found is not None and found.trained is not None else optimizer
        super().backward(loss, model, own)


@saboteur("OPT-11")
class SaysNothing(FakeStrategy):
    """A loss without graph is reported as torch reports it."""

    def backward(self, loss: Any, model: Any, optimizer: Any, *, retain_graph: bool = False) -> None:
        if isinstance(loss, torch.Tensor) and not loss.requires_grad:
            loss.backward()
        super().backward(loss, model, optimizer)


@saboteur("OPT-12")
class SaysApplied(Stepping):
    """A skipped update is reported as applied."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        result = self.straight(optimizer, model, scheduler, boundary)
        return StepResult(applied=result.applied or result.skipped, skipped=result.skipped, grad_norm=result.grad_norm)


@saboteur("OPT-12")
class NormEverywhere(Stepping):
    """A norm is reported inside the window too."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        result = self.straight(optimizer, model, scheduler, boundary)
        return StepResult(applied=result.applied, skipped=result.skipped, grad_norm=result.grad_norm or 0.0)


@saboteur("OPT-16", world=2, verdict="fail")
class ClaimsUneven(PlainStrategy):
    """Claims uneven_modules, and leaves out of the mean the ranks that did not use a module."""

    @override
    def average(self, trained: TrainedModel) -> None:
        used = [float(p.grad is not None) for p in trained.parameters]
        counts = [self.all_reduce(it, "sum") for it in used]
        super().average(trained)
        for parameter, count in zip(trained.parameters, counts, strict=True):
            parameter.grad *= self.world.size / max(1.0, count)  # type: ignore[operator]


@saboteur("OPT-16", world=2)
class DeniesUneven(PlainStrategy):
    """Has uneven_modules, and denies it."""

    capabilities = frozenset()


@saboteur("OPT-18")
class ClaimsAdoption(FakeStrategy):
    """Claims to adopt bare models, and refuses them."""

    adopts = False


@saboteur("OPT-18")
class DeniesAdoption(FakeStrategy):
    """Adopts bare models, and denies it."""

    capabilities = frozenset({"uneven_modules"})


@saboteur("OPT-19")
class AveragesEachCall(FakeStrategy):
    """The average moves at each call, update or not."""

    def moving_average(self, model: Any, model_ema: Any, beta: float = 0.992, device: Any = None) -> None:
        self._averages._seen.clear()
        found = self._models.find(model)
        assert found is not None and found.trained is not None
        found.trained.updates += 1
        super().moving_average(model, model_ema, beta, device)
        found.trained.updates -= 1


@saboteur("OPT-19")
class AveragesTheWrongWay(FakeStrategy):
    """beta and 1 - beta are exchanged."""

    def moving_average(self, model: Any, model_ema: Any, beta: float = 0.992, device: Any = None) -> None:
        super().moving_average(model, model_ema, min(1 - beta, 0.999), device)


@saboteur("PREP-9")
class DeadRates(FakeStrategy):
    """The learning rate is that of the time of preparing."""

    @override
    def _bind(self, trained: TrainedModel) -> None:
        self._rates: dict[int, Sequence[float]] = {
            id(trained): [group["lr"] for group in trained.optimizer.param_groups]
        }

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        for group, rate in zip(trained.optimizer.param_groups, self._rates.get(id(trained), []), strict=False):
            group["lr"] = rate
        return super()._update(trained, factor)
