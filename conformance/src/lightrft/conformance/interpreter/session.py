"""What a program has created so far on this rank."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

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
    scheduler: Any = None


@dataclass(kw_only=True)
class Session:
    """One program on one rank."""

    make: Callable[..., StrategyBase]
    """Creates the strategy under test from settings."""
    settings: dict[str, Any]
    rank: int
    models: dict[str, Entry] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    """Values that one operation stores for a later one."""
    _strategy: StrategyBase | None = None

    @property
    def strategy(self) -> StrategyBase:
        """The strategy under test, created at first use."""
        if self._strategy is None:
            self._strategy = self.make(self.settings)
        return self._strategy

    def close(self) -> None:
        """Close the strategy, if it was created."""
        strategy, self._strategy = self._strategy, None
        self.models.clear()
        if strategy is not None:
            strategy.close()
