"""Correct strategies that look odd, and must not be accused."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import control
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import GradientShards, ReplicatedBackend, TrainedModel
from lightrft.strategy.backend.types import WrapOptions
from lightrft.strategy.fake_strategy import FakeBackend


@control()
class Slow(FakeBackend):
    """Waits 5 ms in each update."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        time.sleep(0.005)


@control()
class Backwards(FakeBackend):
    """Sums the norm in the opposite order."""

    @override
    def gradient_shards(self, trained: TrainedModel) -> Sequence[GradientShards]:
        return [GradientShards(tensors=list(reversed(part.tensors))) for part in super().gradient_shards(trained)]


class Shell(nn.Module):
    """A wrapper that does nothing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


@control()
class Wrapping(FakeBackend):
    """Wraps every model, and so does not accept unprepared ones."""

    accepts_unprepared = False
    capabilities = frozenset({"rank_dependent_modules"})

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        return Shell(super().wrap(module, options))


@control(world=2)
class TwoRanks(PlainStrategy):
    """Averages gradients once per update."""


@control(world=2)
class AveragesAtOnce(ReplicatedBackend):
    """Averages gradients in each backward pass, as FSDP2 does."""

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        before = [None if p.grad is None else p.grad.clone() for p in trained.parameters]
        for parameter in trained.parameters:
            parameter.grad = None
        super().backward(trained, loss, retain_graph=retain_graph)
        super().reduce(trained)
        for parameter, old in zip(trained.parameters, before, strict=True):
            if old is not None and parameter.grad is not None:
                parameter.grad += old

    @override
    def reduce(self, trained: TrainedModel) -> None:
        pass


@control()
class Chatty(FakeStrategy):
    """Prints 50 lines in each call."""

    @contextmanager
    @override
    def _running(self, call: str) -> Iterator[None]:
        for _ in range(50):
            print(f"now in {call}")
        with super()._running(call):
            yield
