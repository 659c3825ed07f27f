"""Defects in one edge case: on one rank, with the second model, after an exception, with one type or shape."""

import logging
import math
import sys
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import CollectiveHooks, Device
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, World, broadcast, materialize
from lightrft.strategy.backend.types import WrapOptions
from lightrft.strategy.distributed.collectives import ReduceOp
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.update import reduce_clip_and_step
from lightrft.strategy.telemetry.log import logger

# mypy: disable-error-code="misc"


@saboteur("LIFE-1")
class SeedsAgain(FakeStrategy):
    """Each call of setup_distributed sets the seed."""

    def setup_distributed(self, timeout: timedelta | None = None) -> None:
        again = self._open
        super().setup_distributed(timeout)
        if again:
            self.set_seed(self.config.seed)


@saboteur("LIFE-5")
class OpenAfterAnError(FakeStrategy):
    """The strategy is not closed if an exception leaves the with block."""

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.close()


@saboteur("LIFE-9")
class GatheringDraws(FakeStrategy):
    """all_gather draws from NumPy's random stream."""

    def all_gather(self, data: Any) -> Any:
        np.random.rand()
        return super().all_gather(data)


@saboteur("LOG-1", world=2)
class ErrorsOfAllRanks(ReplicatedBackend):
    """The logger logs errors on every rank."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._filters = list(logger.filters)
        logger.filters[:] = [lambda record: self.world.rank == 0 or record.levelno >= logging.ERROR]

    @override
    def close(self) -> None:
        logger.filters[:] = self._filters


@saboteur("LOG-1", world=2)
class PrintsBesides(PlainStrategy):
    """On ranks other than 0, print prints to standard error."""

    def print(self, *message: object) -> None:
        if not self.is_rank_0():
            print(*message, file=sys.stderr)
        super().print(*message)


@saboteur("COLL-1", world=2)
class MaxOfAnIntIsAFloat(PlainStrategy):
    """The maximum of a single Python int is a float."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        result = super().all_reduce(data, op)
        return float(result) if op == "max" and isinstance(data, int) else result


@saboteur("COLL-3")
class SortedInside(CollectiveHooks, FakeStrategy):
    """Keys of dicts come back sorted from the third level of nesting on."""

    @override
    def reduced(self, data: object, result: object) -> object:
        return self._sorted(result, 0)

    def _sorted(self, data: object, depth: int) -> object:
        if not isinstance(data, dict):
            return data
        return {key: self._sorted(data[key], depth + 1) for key in (sorted(data) if depth > 1 else data)}


@saboteur("COLL-4")
class GathersMemory(FakeStrategy):
    """all_gather reads a strided tensor as if it were contiguous."""

    def all_gather(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) and not data.is_contiguous():
            data = torch.as_strided(data, data.shape, torch.empty(data.shape).stride())
        return super().all_gather(data)


@saboteur("COLL-4")
class NoRowsNoColumns(CollectiveHooks, FakeStrategy):
    """all_gather of 0 rows loses the other dimensions."""

    @override
    def gathered(self, data: object, result: object) -> object:
        return result.reshape(-1) if isinstance(result, torch.Tensor) and not result.numel() else result


@saboteur("COLL-4", world=2)
class LargestFirst(CollectiveHooks, PlainStrategy):
    """all_gather puts the rank with the most rows first."""

    @override
    def gathered(self, data: object, result: object) -> object:
        if not isinstance(data, torch.Tensor) or not isinstance(result, torch.Tensor) or not data.ndim:
            return result
        first, second = super().all_gather(data.shape[0]).tolist()
        return torch.cat([result[first:], result[:first]]) if second > first else result


@saboteur("COLL-5", world=2)
class AloneAfterAnError(PlainStrategy):
    """After an error, all_reduce returns its argument."""

    _alone = False

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        if self._alone:
            return data.clone()
        try:
            return super().all_reduce(data, op)
        except Exception:
            self._alone = True
            raise


@saboteur("PREP-2")
class UntiesInference(FakeBackend):
    """Tied weights of models prepared for inference are untied."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        head = getattr(module, "head", None)
        if not options.training and isinstance(head, nn.Linear):
            head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        return super().wrap(module, options)


@saboteur("PREP-3")
class CastsBuffers(FakeBackend):
    """With bf16, buffers are cast to bf16 too."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        for buffer in module.buffers() if self.config.bf16 else ():
            buffer.data = buffer.data.bfloat16()
        return super().wrap(module, options)


@saboteur("PREP-6", world=2)
class OnlyWhatIsSaved(ReplicatedBackend):
    """Non-persistent buffers stay uninitialised on ranks other than 0."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        materialize(module, self.world.device)
        for tensor in module.state_dict(keep_vars=True).values():
            broadcast(tensor.data, self.world)
        return module


@saboteur("PREP-7")
class OneRate(FakeStrategy):
    """The critic trains with the actor's learning rate."""

    def prepare_models_and_optimizers(self, *arguments: Any) -> Any:
        self.config = self.config.replace(critic_learning_rate=self.config.actor_learning_rate)
        return super().prepare_models_and_optimizers(*arguments)


@saboteur("PREP-10")
class ListsTrain(FakeStrategy):
    """Models prepared in a list stay in training mode."""

    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        result = super().prepare(*models)
        for model in models[0] if isinstance(models[0], list) else ():
            model.train()
        return result


@saboteur("OPT-2")
class ScalesTheLoss(FakeStrategy):
    """backward divides the loss by K in place."""

    def backward(self, loss: Tensor, model: nn.Module, optimizer: Optimizer, **more: Any) -> None:
        super().backward(loss, model, optimizer, **more)
        loss.data.div_(self.accumulated_gradient)


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


@saboteur("OPT-19")
class OneAverage(FakeStrategy):
    """Of several averages of a model, only the first moves."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        if model_ema is self.__dict__.setdefault("_first", model_ema):
            super().moving_average(model, model_ema, beta, device)


@saboteur("OPT-19")
class WrappedAverageStays(FakeStrategy):
    """An average in a wrapper that is not marked as an actor does not move."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        if not hasattr(model_ema, "model"):
            super().moving_average(model, model_ema, beta, device)


@saboteur("OPT-19")
class HalfAverage(FakeStrategy):
    """With bf16 the average is rounded to bf16."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        super().moving_average(model, model_ema, beta, device)
        for parameter in self.unwrap_model(model_ema).parameters() if self.config.bf16 else ():
            parameter.data = parameter.data.bfloat16().float()


@saboteur("OPT-19", world=2)
class LastRankAveragesLess(PlainStrategy):
    """On the last rank the average moves half as far."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        lazy = self.world.rank == self.world.size - 1
        super().moving_average(model, model_ema, 1 - (1 - beta) / 2 if lazy else beta, device)


@saboteur("OPT-3", world=2)
class OwnNorm(ReplicatedBackend):
    """The last rank reports the norm of its local gradient."""

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        squares = [parameter.grad.square().sum() for parameter in trained.parameters if parameter.grad is not None]
        local_norm = factor * float(torch.stack(squares).sum().sqrt())
        norm = reduce_clip_and_step(self, trained, factor)
        return local_norm if self.world.rank == self.world.size - 1 and math.isfinite(norm) else norm
