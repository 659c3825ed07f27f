"""What a program has created so far on this rank."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from lightrft.conformance.values import Record
from lightrft.strategy import StrategyBase

Operation = Callable[..., Any]
OPERATIONS: dict[str, Operation] = {}
"""All operations by name: functions of the session and of the operation's arguments."""


Function = TypeVar("Function", bound=Operation)


def operation(function: Function) -> Function:
    """Register ``function`` under its own name."""
    OPERATIONS[function.__name__] = function
    return function


@dataclass(kw_only=True)
class Entry:
    """A model of the program, as a training script would hold it."""

    module: nn.Module
    """The model as it was built."""
    model: nn.Module
    """The model as it is called, possibly wrapped."""
    optimizer: torch.optim.Optimizer | None = None
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None


@dataclass(kw_only=True)
class Session:
    """One program on one rank."""

    make: Callable[..., StrategyBase]
    """Creates the strategy under test from settings."""
    settings: Record
    rank: int
    models: dict[str, Entry] = field(default_factory=dict)
    memory: Record = field(default_factory=dict)
    """Values that one operation stores for a later one."""
    _strategy: StrategyBase | None = None

    @property
    def strategy(self) -> StrategyBase:
        """The strategy under test, created at first use."""
        if self._strategy is None:
            self._strategy = self.make(self.settings)
        return self._strategy

    def optimizer(self, model: str) -> torch.optim.Optimizer:
        """The optimizer of a model in training."""
        optimizer = self.models[model].optimizer
        assert optimizer is not None
        return optimizer

    def weights(self, model: nn.Module) -> list[tuple[str, torch.Tensor]]:
        """What full_parameters yields in fp32, copied. All ranks must call this."""
        stream = self.strategy.full_parameters(model, dtype=torch.float32)
        return [(name, tensor.clone()) for bucket in stream for name, tensor in bucket]

    def close(self) -> None:
        """Close the strategy, if it was created."""
        strategy, self._strategy = self._strategy, None
        self.models.clear()
        if strategy is not None:
            strategy.close()
