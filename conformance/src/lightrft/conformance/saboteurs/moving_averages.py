"""Defects of moving averages."""

from torch import nn

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import Device
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy

# mypy: disable-error-code="misc, union-attr, arg-type"


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


@saboteur("OPT-19")
class FirstBeta(FakeStrategy):
    """An average keeps the beta of its first move."""

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: Device = None
    ) -> None:
        betas = self.__dict__.setdefault("_betas", {})
        super().moving_average(model, model_ema, betas.setdefault(id(model_ema), beta), device)
