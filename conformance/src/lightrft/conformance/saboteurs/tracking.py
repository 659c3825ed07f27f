"""Defects of metrics."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import StepHooks
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy, StepResult, registry
from lightrft.strategy.telemetry.trackers import Tracker
from lightrft.strategy.telemetry.tracking import Tracking

# mypy: disable-error-code="misc"


@saboteur("LOG-2", world=2)
class EveryRankWrites(PlainStrategy):
    """Every rank passes its metrics to the trackers."""

    def _begin(self) -> None:
        super()._begin()
        self._tracking = Tracking.begin(self.config, self.name, 0, self.world_size, self.device)


@saboteur("LOG-2", world=2)
class LogWaits(PlainStrategy):
    """log waits for the other ranks."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        super().log(metrics, step)
        self._consensus.barrier()


@saboteur("LOG-2")
class TrackersStopTheScript(FakeStrategy):
    """What a tracker raises reaches the script."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        super().log(metrics, step)
        for name in self.config.trackers:
            registry.load(registry.TRACKERS, name, Tracker)().log({}, step)  # type: ignore[type-abstract]


@saboteur("LOG-2")
class TextIsDropped(FakeStrategy):
    """log leaves out values that are not numbers, without an error."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        super().log({name: value for name, value in metrics.items() if not isinstance(value, str)}, step)


@saboteur("LOG-3", world=2)
class LossOfOneRank(PlainStrategy):
    """optimizer_step reports only this rank's loss if losses have no denominators."""

    local_loss: float

    def backward(self, loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
        super().backward(loss, model, optimizer, **more)
        self.local_loss = float(sum(self._trained(model, optimizer, "backward").losses)) / self.accumulated_gradient

    def optimizer_step(self, *arguments: Any, **more: Any) -> StepResult:
        result = super().optimizer_step(*arguments, **more)
        plain = result.loss is not None and result.denominator is None
        return dataclasses.replace(result, loss=self.local_loss) if plain else result


@saboteur("LOG-3")
class LossIsASum(StepHooks):
    """With denominators, optimizer_step reports the sum of the losses."""

    @override
    def reported(self, result: StepResult) -> StepResult:
        if result.loss is None or result.denominator is None:
            return result
        return dataclasses.replace(result, loss=result.loss * result.denominator)


@saboteur("LOG-3")
class LogsTheFirstLoss(FakeStrategy):
    """The loss in log is that of the first update, whatever came since."""

    first: float | None = None

    def optimizer_step(self, optimizer: Optimizer, model: nn.Module, *arguments: Any, **more: Any) -> StepResult:
        result = super().optimizer_step(optimizer, model, *arguments, **more)
        self.first = result.loss if self.first is None else self.first
        return result

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        super().log({**metrics, **({} if self.first is None else {"model/loss": self.first})}, step)


@saboteur("LOG-2")
class ZerosAreDropped(FakeStrategy):
    """log leaves out metrics that are 0."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        super().log({name: value for name, value in metrics.items() if value != 0}, step)
