"""What a program has built so far on this rank."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from lightrft.strategy import StrategyBase

Operation = Callable[..., Any]
OPERATIONS: dict[str, Operation] = {}
"""Every operation by name: a function of the session and of the operation's own arguments."""


Function = TypeVar("Function", bound=Operation)


def operation(function: Function) -> Function:
    """Register ``function`` under its own name."""
    OPERATIONS[function.__name__] = function
    return function


@dataclass(kw_only=True)
class Entry:
    """A model of the program: what the script holds in its hands."""

    module: nn.Module
    """As it was built."""
    model: nn.Module
    """As it is called now."""
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Any = None


@dataclass(kw_only=True)
class Session:
    """One program on one rank."""

    make: Callable[..., StrategyBase]
    """Makes the strategy under test, with settings."""
    settings: dict[str, Any]
    rank: int
    models: dict[str, Entry] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    """What one operation leaves for a later one."""
    _strategy: StrategyBase | None = None

    @property
    def strategy(self) -> StrategyBase:
        """The strategy under test, made at first use."""
        if self._strategy is None:
            self._strategy = self.make(self.settings)
        return self._strategy

    def close(self) -> None:
        """End the strategy, if it was made."""
        strategy, self._strategy = self._strategy, None
        self.models.clear()
        if strategy is not None:
            strategy.close()
