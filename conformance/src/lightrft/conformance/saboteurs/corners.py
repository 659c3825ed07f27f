"""Defects of one corner: on one rank, with the second model, after an exception, in one type or form."""

import logging
import math
import sys
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.conformance.saboteurs.stepping import Stepping
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.log import logger
from lightrft.strategy.training.modules import broadcast, materialize
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc"


@saboteur("LIFE-1")
class SeedsAgain(FakeStrategy):
    """setup_distributed sets the seed each time."""

    def setup_distributed(self, timeout: Any = None) -> None:
        again = self._open
        super().setup_distributed(timeout)
        if again:
            self.set_seed(self.config.seed)


@saboteur("LIFE-5")
class OpenAfterAnError(FakeStrategy):
    """A with block that an exception leaves is not closed."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()


@saboteur("LIFE-9")
class GatheringDraws(FakeStrategy):
    """all_gather draws from NumPy's stream."""

    def all_gather(self, data: Any) -> Any:
        np.random.rand()
        return super().all_gather(data)


@saboteur("LOG-1", world=2)
class ErrorsOfAllRanks(PlainStrategy):
    """The logger speaks of errors on every rank."""

    @override
    def _setup(self) -> None:
        self._silent = list(logger.filters)
        logger.filters[:] = [lambda record: self.world.rank == 0 or record.levelno >= logging.ERROR]

    @override
    def _teardown(self) -> None:
        logger.filters[:] = self._silent


@saboteur("LOG-1", world=2)
class PrintsBesides(PlainStrategy):
    """On ranks other than 0 print goes to standard error."""

    def print(self, *message: object) -> None:
        if not self.is_rank_0():
            print(*message, file=sys.stderr)
        super().print(*message)


@saboteur("COLL-1", world=2)
class MaxOfAnIntIsAFloat(PlainStrategy):
    """The maximum of a Python int, by itself, is a float."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        result = super().all_reduce(data, op)
        return float(result) if op == "max" and isinstance(data, int) else result


@saboteur("COLL-3")
class SortedInside(FakeStrategy):
    """Keys of dicts in dicts in dicts come back sorted."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        return self._sorted(super().all_reduce(data, op), 0)

    def _sorted(self, data: Any, depth: int) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: self._sorted(data[key], depth + 1) for key in (sorted(data) if depth > 1 else data)}


@saboteur("COLL-4")
class GathersMemory(FakeStrategy):
    """all_gather takes a strided tensor's memory as it lies."""

    def all_gather(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) and not data.is_contiguous():
            data = torch.as_strided(data, data.shape, torch.empty(data.shape).stride())
        return super().all_gather(data)


@saboteur("COLL-4")
class NoRowsNoColumns(FakeStrategy):
    """all_gather of no rows at all has lost the columns."""

    def all_gather(self, data: Any) -> Any:
        result = super().all_gather(data)
        return result.reshape(-1) if isinstance(result, torch.Tensor) and not result.numel() else result


@saboteur("COLL-4", world=2)
class LargestFirst(PlainStrategy):
    """all_gather begins with the rank that has the most rows."""

    def all_gather(self, data: Any) -> Any:
        result = super().all_gather(data)
        if not isinstance(data, torch.Tensor) or not data.ndim:
            return result
        first, second = super().all_gather(data.shape[0]).tolist()
        return torch.cat([result[first:], result[:first]]) if second > first else result


@saboteur("COLL-5", world=2)
class AloneAfterAnError(PlainStrategy):
    """After an error all_reduce gives back what it was given."""

    _alone = False

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        if self._alone:
            return data.clone()
        try:
            return super().all_reduce(data, op)
        except Exception:
            self._alone = True
            raise


@saboteur("PREP-2")
class UntiesInference(FakeStrategy):
    """A model prepared for inference has its tied weights twice."""

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        head = getattr(module, "head", None)
        if not options.training and isinstance(head, nn.Linear):
            head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
        return super()._wrap(module, options)


@saboteur("PREP-3")
class CastsBuffers(FakeStrategy):
    """With bf16, buffers become bf16 too."""

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        for buffer in module.buffers() if self.config.bf16 else ():
            buffer.data = buffer.data.bfloat16()
        return super()._wrap(module, options)


@saboteur("PREP-6", world=2)
class OnlyWhatIsSaved(PlainStrategy):
    """Buffers that no checkpoint has stay uninitialised on ranks other than 0."""

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        materialize(module, self.world.device)
        for tensor in module.state_dict(keep_vars=True).values():
            broadcast(tensor.data, self.world)
        return module


@saboteur("PREP-7")
class OneRate(FakeStrategy):
    """The critic trains with the actor's rate."""

    def prepare_models_and_optimizers(self, *arguments: Any) -> Any:
        self.config = self.config.replace(critic_learning_rate=self.config.actor_learning_rate)
        return super().prepare_models_and_optimizers(*arguments)


@saboteur("PREP-9")
class BetasNotLive(FakeStrategy):
    """Betas that a script changes in param_groups have no effect."""

    @override
    def _bind(self, trained: TrainedModel) -> None:
        self._betas = [group["betas"] for group in trained.optimizer.param_groups]

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        for group, betas in zip(trained.optimizer.param_groups, self._betas, strict=True):
            group["betas"] = betas
        return super()._update(trained, factor)


@saboteur("PREP-10")
class ListsTrain(FakeStrategy):
    """Models that are prepared in a list stay in training mode."""

    def prepare(self, *models: Any, is_rlhf: bool = False) -> Any:
        result = super().prepare(*models)
        for model in models[0] if isinstance(models[0], list) else ():
            model.train()
        return result


@saboteur("OPT-2")
class ScalesTheLoss(FakeStrategy):
    """backward leaves the loss divided by K."""

    def backward(self, loss: Any, model: Any, optimizer: Any, *, retain_graph: bool = False) -> None:
        super().backward(loss, model, optimizer, retain_graph=retain_graph)
        loss.data.div_(self.accumulated_gradient)


@saboteur("OPT-4", world=2)
class SecondModelSkipsNothing(PlainStrategy):
    """What is not finite on the last rank counts as zero in every model but the first."""

    @override
    def _bind(self, trained: TrainedModel) -> None:
        self._first = self.__dict__.get("_first", trained)

    @override
    def average(self, trained: TrainedModel) -> None:
        if trained is not self._first and self.world.rank == self.world.size - 1:
            for parameter in trained.parameters:
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0, 0, 0)
        super().average(trained)


@saboteur("OPT-6")
class SchedulesTheSecondSkip(Stepping):
    """The schedule moves at the second skip in a row."""

    def bent(self, optimizer: Any, model: Any, scheduler: Any, boundary: Any) -> Any:
        result = self.straight(optimizer, model, scheduler, boundary)
        trained = self._trained(model, optimizer, "optimizer_step")
        if result.skipped and scheduler is not None and trained.skipped_in_a_row == 2:
            scheduler.step()
        return result


@saboteur("OPT-7")
class FrozenDecay(FakeStrategy):
    """Parameters that are frozen between updates go on decaying."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        frozen = [parameter for parameter in trained.parameters if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            return super()._update(trained, factor)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


@saboteur("OPT-19")
class OneAverage(FakeStrategy):
    """Of several averages of a model only the first moves."""

    def moving_average(self, model: Any, model_ema: Any, *arguments: Any, **more: Any) -> None:
        first = self.__dict__.setdefault("_first", model_ema)
        if model_ema is first:
            super().moving_average(model, model_ema, *arguments, **more)


@saboteur("OPT-19")
class HalfAverage(FakeStrategy):
    """With bf16 the average is rounded to bf16."""

    def moving_average(self, model: Any, model_ema: Any, *arguments: Any, **more: Any) -> None:
        super().moving_average(model, model_ema, *arguments, **more)
        for parameter in self.unwrap_model(model_ema).parameters() if self.config.bf16 else ():
            parameter.data = parameter.data.bfloat16().float()


@saboteur("OPT-19", world=2)
class LazyAverage(PlainStrategy):
    """On the last rank the average moves half as far."""

    def moving_average(self, model: Any, model_ema: Any, beta: float = 0.992, device: Any = None) -> None:
        lazy = self.world.rank == self.world.size - 1
        super().moving_average(model, model_ema, 1 - (1 - beta) / 2 if lazy else beta, device)


@saboteur("OPT-3", world=2)
class OwnNorm(PlainStrategy):
    """The last rank reports the norm of its own gradient."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        squares = [parameter.grad.square().sum() for parameter in trained.parameters if parameter.grad is not None]
        own = factor * float(torch.stack(squares).sum().sqrt())
        norm = super()._update(trained, factor)
        return own if self.world.rank == self.world.size - 1 and math.isfinite(norm) else norm
