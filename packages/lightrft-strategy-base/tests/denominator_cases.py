"""What a rank does in `test_denominators`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import LightRFTError
from lightrft.strategy import StrategyBase


class Plain(StrategyBase):
    """Plain data parallelism."""

    name = "plain"


def linear() -> nn.Linear:
    """The same on all ranks, without a rounding error in what follows."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    return model


def prepared(strategy: StrategyBase) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = linear()
    model, optimizer, _ = strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=1.0), None))
    return model, optimizer


def collectives_of_an_update(denominator: float | None) -> list[tuple[int, bool]]:
    """The elements of each tensor that an update sums over the ranks, and whether the call returned at once."""
    made: list[tuple[int, bool]] = []
    plain_all_reduce = dist.all_reduce

    def noted(tensor: torch.Tensor, *arguments: Any, async_op: bool = False, **more: Any) -> Any:
        made.append((tensor.numel(), async_op))
        return plain_all_reduce(tensor, *arguments, async_op=async_op, **more)

    with Plain(device="cpu", bf16=False, train_batch_size=2) as strategy:
        model, optimizer = prepared(strategy)
        dist.all_reduce = noted
        try:
            strategy.backward(model(torch.ones(3, 2)).sum(), model, optimizer, denominator=denominator)
            strategy.optimizer_step(optimizer, model)
        finally:
            dist.all_reduce = plain_all_reduce
    return made


def errors_of_unequal_ranks(others: float | None, mine: Any, rank: int) -> tuple[str, list[float]]:
    """The error on this rank if ``rank`` alone passes ``mine``, and the weights after one more update of 4 items."""
    with Plain(device="cpu", bf16=False, train_batch_size=2, max_norm=None) as strategy:
        model, optimizer = prepared(strategy)
        given = mine if strategy.get_rank() == rank else others
        strategy.backward(model(torch.ones(3, 2)).sum(), model, optimizer, denominator=given)
        message = "no error"
        try:
            strategy.optimizer_step(optimizer, model)
        except LightRFTError as error:
            message = f"{type(error).__name__}: {error}"
        strategy.backward(model(torch.ones(2, 2)).sum(), model, optimizer, denominator=2)
        strategy.optimizer_step(optimizer, model)
        return message, model.weight.flatten().tolist()
