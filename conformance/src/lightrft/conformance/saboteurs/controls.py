"""Right strategies that look odd, and must not be accused."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import control
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.training.gradients import GradientShards
from lightrft.strategy.training.trained_model import TrainedModel


@control()
class Slow(FakeStrategy):
    """Takes its time over every update."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        time.sleep(0.005)
        return super()._update(trained, factor)


@control()
class Backwards(FakeStrategy):
    """Sums the norm in the opposite order."""

    @override
    def _gradient_shards(self, trained: TrainedModel) -> Sequence[GradientShards]:
        return [GradientShards(tensors=list(reversed(part.tensors))) for part in super()._gradient_shards(trained)]


class Shell(nn.Module):
    """A wrapper that does nothing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@control()
class Wrapping(FakeStrategy):
    """Wraps every model, and so does not adopt bare ones."""

    adopts = False
    capabilities = frozenset({"uneven_modules"})

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        return Shell(super()._wrap(module, options))


@control(world=2)
class TwoRanks(PlainStrategy):
    """Averages gradients by hand."""


@control(world=2)
class AveragesAtOnce(PlainStrategy):
    """Averages the gradient at each backward: the other family."""

    @override
    def _backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        before = [None if p.grad is None else p.grad.clone() for p in trained.parameters]
        for parameter in trained.parameters:
            parameter.grad = None
        loss.backward(retain_graph=retain_graph)
        self.average(trained)
        for parameter, old in zip(trained.parameters, before, strict=True):
            if old is not None and parameter.grad is not None:
                parameter.grad += old

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        return FakeStrategy._update(self, trained, factor)


@control()
class Chatty(FakeStrategy):
    """Prints a great deal."""

    @contextmanager
    @override
    def _running(self, call: str) -> Iterator[None]:
        for _ in range(50):
            print(f"now in {call}")
        with super()._running(call):
            yield
