"""Defects in what is refused, reported and claimed."""

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.config import LightRFTError, StrategyConfig, StrategyError
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import Device, StepHooks
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy, StepResult
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, World
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.update import reduce_clip_and_step

# mypy: disable-error-code="misc"


@saboteur("OPT-11")
class AcceptsVectors(FakeStrategy):
    """A loss that is not a scalar is averaged."""

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Optimizer, **more: object) -> None:
        super().backward(loss.mean() if isinstance(loss, Tensor) and loss.ndim else loss, model, optimizer)


@saboteur("OPT-11")
class AcceptsAnyOptimizer(FakeStrategy):
    """backward does not check the optimizer."""

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Optimizer, **more: object) -> None:
        prepared = self._models.find(model)
        if prepared is not None and prepared.trained is not None:
            optimizer = prepared.trained.optimizer
        super().backward(loss, model, optimizer)


@saboteur("OPT-11")
class LossErrorOfTorch(FakeStrategy):
    """The error for a loss without a graph is that of torch."""

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Optimizer, **more: object) -> None:
        if isinstance(loss, Tensor) and not loss.requires_grad:
            loss.backward()
        super().backward(loss, model, optimizer)


@saboteur("OPT-11")
class AcceptsAnyLoss(FakeBackend):
    """backward accepts the loss of another model."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._leaves: set[int] = set()

    @override
    def bind(self, trained: TrainedModel) -> None:
        self._leaves |= trained.parameter_ids

    @override
    def graph_leaves(self, trained: TrainedModel) -> Collection[int]:
        return self._leaves


@saboteur("OPT-23", world=2)
class RaisesBeforeTheUpdate(PlainStrategy):
    """The rank that passes a wrong argument to optimizer_step raises at once and alone; the others wait for it."""

    @override
    def _trained_or_pending(self, model: nn.Module, optimizer: Optimizer) -> TrainedModel:
        return self._trained(model, optimizer, "optimizer_step")


@saboteur("OPT-23", world=2)
class TellsOneRank(PlainStrategy):
    """An update with a wrong argument on one rank is made, and only that rank raises."""

    _mistake: LightRFTError | None = None

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None = None, *rest: Any, **more: Any
    ) -> StepResult:
        (trained,) = (each for each in self._models.in_training if each.backward_calls)
        right = trained.optimizer, trained.model
        if (optimizer, model) != right or getattr(scheduler, "optimizer", optimizer) is not optimizer:
            self._mistake = StrategyError("optimizer_step: expected the optimizer, model and scheduler of one model")
        result = super().optimizer_step(*right, None if self._mistake else scheduler, *rest, **more)
        mistake, self._mistake = self._mistake, self._mistake if result.grad_norm is None else None
        if mistake is not None and result.grad_norm is not None:
            raise mistake
        return result


@saboteur("OPT-23", world=2)
class AppliesWhatItRefuses(ReplicatedBackend):
    """Every rank raises for a wrong argument of one rank, after the update was applied."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        return reduce_clip_and_step(self, trained, 1.0 if math.isnan(factor) else factor)


@saboteur("OPT-12")
class ReportsSkipAsApplied(StepHooks):
    """A skipped update is reported as applied."""

    @override
    def reported(self, result: StepResult) -> StepResult:
        return StepResult(applied=result.applied or result.skipped, skipped=result.skipped, grad_norm=result.grad_norm)


@saboteur("OPT-12")
class NormEverywhere(StepHooks):
    """A norm is reported between updates too."""

    @override
    def reported(self, result: StepResult) -> StepResult:
        return StepResult(applied=result.applied, skipped=result.skipped, grad_norm=result.grad_norm or 0.0)


@saboteur("OPT-16", world=2)
class ClaimsRankDependentModules(ReplicatedBackend):
    """Claims rank_dependent_modules, but averages over the ranks that used a module, not over all."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        used = torch.tensor([float(parameter.grad is not None) for parameter in trained.parameters])
        dist.all_reduce(used, group=self.world.cpu_group)
        super().reduce(trained)
        for parameter, ranks in zip(trained.parameters, used.tolist(), strict=True):
            parameter.grad *= self.world.size / max(1.0, ranks)


@saboteur("OPT-16", world=2)
class DeniesRankDependentModules(ReplicatedBackend):
    """Can train rank-dependent modules, but does not claim rank_dependent_modules."""

    capabilities = frozenset()


@saboteur("OPT-18")
class ClaimsUnpreparedModels(FakeBackend):
    """Claims unprepared_models, but refuses unprepared models."""

    accepts_unprepared = False


@saboteur("OPT-18")
class DeniesUnpreparedModels(FakeBackend):
    """Accepts unprepared models, but does not claim unprepared_models."""

    capabilities = frozenset({"rank_dependent_modules"})


@saboteur("OPT-19")
class AveragesEachCall(FakeStrategy):
    """The average moves at each call, whether there was an update or not."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        self._averages.restore(self.unwrap_model(model_ema), -1)
        super().moving_average(model, model_ema, beta, device)


@saboteur("OPT-19")
class AveragesTheWrongWay(FakeStrategy):
    """beta and 1 - beta are swapped."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        super().moving_average(model, model_ema, min(1 - beta, 0.999), device)


@saboteur("OPT-19")
class AveragesEarlierUpdates(FakeStrategy):
    """An average also moves for updates before it was made."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        prepared = self._models.find(model)
        if (
            prepared is not None
            and prepared.trained is not None
            and model_ema not in self.__dict__.setdefault("_moved", [])
        ):
            prepared.trained.averages[self.unwrap_model(model_ema)] = 0
            self.__dict__["_moved"].append(model_ema)
        super().moving_average(model, model_ema, beta, device)
