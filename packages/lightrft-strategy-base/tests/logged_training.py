"""A strategy that logs, updates with given losses, and the lines that were written."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft.strategy import FakeStrategy, get_fake_strategy


def strategy(**settings: Any) -> FakeStrategy:
    return get_fake_strategy(**{"bf16": False, "train_batch_size": 2, **settings})


def trained(made: FakeStrategy) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    model, optimizer, _ = made.prepare((model, torch.optim.SGD(model.parameters(), lr=0.25), None))
    return model, optimizer


def update(
    made: FakeStrategy, model: nn.Module, optimizer: torch.optim.Optimizer, *losses: float, norm: float = 1.0
) -> None:
    """One update with these losses, and a gradient of this norm."""
    for index, loss in enumerate(losses, start=1):
        output = norm / math.sqrt(2) * model(torch.ones(1, 2)).sum()
        made.backward(output - output.detach() + loss, model, optimizer)
        made.optimizer_step(optimizer, model, boundary=index == len(losses))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
