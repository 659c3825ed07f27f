"""Defects in what is refused, said and claimed."""

from collections.abc import Sequence
from typing import Any

import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.conformance.saboteurs.stepping import Stepping
from lightrft.strategy import FakeStrategy, StepResult
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc"


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


@saboteur("OPT-11")
class TakesAnyLoss(FakeStrategy):
    """The loss of another model is taken, and makes an update from no gradient."""

    @override
    def _leaves(self, trained: TrainedModel) -> frozenset[int]:
        return frozenset(id(parameter) for found in self._models for parameter in found.module.parameters())


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
            parameter.grad *= self.world.size / max(1.0, count)


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
        assert found is not None
        assert found.trained is not None
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
