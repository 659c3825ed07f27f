"""Defects of losses with denominators."""

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.config import ArgumentError, StrategyError
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import StepHooks
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy, StepResult, StrategyBase
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, fill_missing_gradients
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.gradients import clip_factor, global_norm
from lightrft.strategy.step.update import reduce_clip_and_step

# mypy: disable-error-code="misc, union-attr, operator, assignment"

Number = float | torch.Tensor | None


class DenominatorHooks(StrategyBase):
    """A hook for the denominator, before a strategy."""

    def backward(
        self,
        loss: torch.Tensor,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        denominator: Number = None,
        **more: Any,
    ) -> None:
        super().backward(loss, model, optimizer, denominator=self.given(denominator, model), **more)

    def given(self, denominator: Number, model: nn.Module) -> Number:
        """Return the denominator to pass on."""
        return denominator

    def earlier(self, model: nn.Module) -> list[Number]:
        """The denominators so far of the update of ``model``."""
        return self._models.find(model).trained.denominators


@saboteur("NORM-1")
class MeanOfMeans(StepHooks):
    """Each loss is divided by its own denominator, and the update is made from the mean of these means."""

    _items: float | None = None

    def backward(
        self, loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, *, denominator: Number = None, **more: Any
    ) -> None:
        if denominator is not None:
            self._items = (self._items or 0.0) + float(denominator)
            loss = loss / max(float(denominator), 1.0)
        super().backward(loss, model, optimizer, **more)

    @override
    def reported(self, result: StepResult) -> StepResult:
        if result.grad_norm is None:
            return result
        items, self._items = self._items, None
        return dataclasses.replace(result, denominator=items)


@saboteur("NORM-1", world=2)
class LocalSums(ReplicatedBackend):
    """Each rank divides by the sum of its own denominators."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        local_sum = sum(value for value in trained.denominators if value is not None)
        if not local_sum or not math.isfinite(factor):
            return reduce_clip_and_step(self, trained, factor)
        for parameter in trained.parameters:
            parameter.grad = None if parameter.grad is None else parameter.grad / local_sum
        return reduce_clip_and_step(self, trained, 1.0)


@saboteur("NORM-1", world=2)
class ForgetsTheMeanOverRanks(ReplicatedBackend):
    """The gradient, a mean over the ranks, is divided by the sum over the ranks."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        given = trained.denominators[0] is not None
        return reduce_clip_and_step(self, trained, factor / self.world.size if given else factor)


@saboteur("NORM-1")
class MeanOverMicroBatches(FakeBackend):
    """With denominators, the gradient is also divided by the number of micro-batches."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        given = trained.denominators[0] is not None
        return reduce_clip_and_step(self, trained, factor / trained.micro_batches if given else factor)


@saboteur("NORM-1")
class SumsInFp32(StepHooks):
    """The denominators are added up in fp32."""

    @override
    def reported(self, result: StepResult) -> StepResult:
        if result.denominator is None:
            return result
        return dataclasses.replace(result, denominator=torch.tensor(result.denominator).item())


@saboteur("NORM-1")
class TensorsCountAsOne(DenominatorHooks, FakeStrategy):
    """A denominator that is a tensor is treated as 1."""

    @override
    def given(self, denominator: Number, model: nn.Module) -> Number:
        return 1.0 if isinstance(denominator, torch.Tensor) else denominator


@saboteur("NORM-2")
class AppliesEmptyUpdate(FakeBackend):
    """An update without items steps with a gradient of zeros: momentum and weight decay move the weights."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        if math.isnan(factor) and not any(trained.denominators):
            fill_missing_gradients(trained.parameters)
            for parameter in trained.parameters:
                parameter.grad.zero_()
            trained.optimizer.step()
        return reduce_clip_and_step(self, trained, factor)


@saboteur("NORM-2")
class KeepsGradientOfEmptyUpdate(FakeBackend):
    """An update without items does not clear the gradient of its losses."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        return factor if math.isnan(factor) else reduce_clip_and_step(self, trained, factor)


@saboteur("NORM-2")
class EmptyUpdateStepsSchedule(StepHooks):
    """An update without items steps the schedule."""

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        if result.denominator == 0 and scheduler is not None:
            scheduler.step()


@saboteur("NORM-2")
class EmptyUpdateCountsAsSkip(StepHooks):
    """Updates without items count for max_skipped_updates."""

    _empty = 0

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        self._empty = self._empty + 1 if result.denominator == 0 else 0
        if self._empty and self._empty == self.config.max_skipped_updates:
            raise StrategyError(f"optimizer_step: {self._empty} updates in a row without items")


@saboteur("NORM-2")
class EmptyUpdateResetsSkips(StepHooks):
    """An update without items resets the count of updates that are not finite."""

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        if result.denominator == 0:
            for trained in self._models.in_training:
                trained.skipped_in_a_row = 0


@saboteur("NORM-2", world=2)
class OneEmptyRankSkips(ReplicatedBackend):
    """The update is skipped if one rank has no items."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        least = torch.tensor(float(sum(value or 0.0 for value in trained.denominators)))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.world.cpu_group)
        given = trained.denominators[0] is not None
        return reduce_clip_and_step(self, trained, math.inf if given and least == 0 else factor)


@saboteur("NORM-3")
class AcceptsNegativeDenominators(DenominatorHooks, FakeStrategy):
    """The sign of a negative denominator is ignored."""

    @override
    def given(self, denominator: Number, model: nn.Module) -> Number:
        return None if denominator is None else abs(float(denominator))


@saboteur("NORM-3")
class AcceptsNonFiniteDenominators(DenominatorHooks, FakeStrategy):
    """A denominator that is not finite is treated as 0."""

    @override
    def given(self, denominator: Number, model: nn.Module) -> Number:
        return 0.0 if denominator is not None and not math.isfinite(denominator) else denominator


@saboteur("NORM-3")
class MixesDenominators(DenominatorHooks, FakeStrategy):
    """A loss without a denominator after one that has one counts as one item."""

    @override
    def given(self, denominator: Number, model: nn.Module) -> Number:
        return 1.0 if denominator is None and self.earlier(model) else denominator


@saboteur("NORM-3", world=2)
class RaisesAlone(DenominatorHooks, PlainStrategy):
    """Only the rank that made the mistake raises; the others make the update."""

    _mistaken = False

    @override
    def given(self, denominator: Number, model: nn.Module) -> Number:
        self._mistaken |= denominator is not None and not (math.isfinite(denominator) and denominator >= 0)
        return 2.0 if self._mistaken else denominator

    def optimizer_step(self, *arguments: Any, **more: Any) -> StepResult:
        result = super().optimizer_step(*arguments, **more)
        if self._mistaken and result.grad_norm is not None:
            self._mistaken = False
            raise ArgumentError("optimizer_step: expected denominators that are finite and not negative")
        return result


@saboteur("NORM-3", world=2)
class AppliesBeforeItRaises(ReplicatedBackend):
    """The error comes after the update was applied."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        return reduce_clip_and_step(self, trained, 1.0 if math.isnan(factor) else factor)


@saboteur("NORM-3", world=2)
class KeepsTheGradientOfMistakes(ReplicatedBackend):
    """The gradient of a refused update is added to the next."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        return factor if math.isnan(factor) else reduce_clip_and_step(self, trained, factor)


@saboteur("NORM-4")
class ClipsTheSum(FakeBackend):
    """With denominators, the gradient is clipped before it is divided by their sum."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        fill_missing_gradients(trained.parameters)
        shards = self.gradient_shards(trained)
        norm = global_norm(shards).item()
        clip = clip_factor(norm, self.config.max_norm) if trained.denominators[0] is not None else 1.0
        reduce_clip_and_step(self, trained, factor * clip)
        return norm * factor


@saboteur("NORM-4")
class ReportsTheNormOfTheSum(StepHooks):
    """The reported norm is that of the gradient before it is divided by the denominators."""

    @override
    def reported(self, result: StepResult) -> StepResult:
        if result.grad_norm is None or result.denominator is None:
            return result
        return dataclasses.replace(result, grad_norm=result.grad_norm * result.denominator)


@saboteur("NORM-3")
class RefusalCountsMicroBatches(FakeStrategy):
    """The micro-batches of a refused update count for the next one."""

    def backward(self, loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
        trained = self._trained(model, optimizer, "backward")
        before = trained.micro_batches
        try:
            super().backward(loss, model, optimizer, **more)
        except ArgumentError:
            trained.micro_batches = before
            raise
