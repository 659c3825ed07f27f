"""Epochs whose samples are no multiple of an update, on any strategy and number of ranks, and the same in plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightrft.config import StrategyConfig
from lightrft.strategy import get_strategy

SAMPLES, UPDATE, EPOCHS, RATE = 76, 12, 2, 0.05


class Network(nn.Sequential):
    """Its layers can be sharded."""

    _no_split_modules = ["Linear"]


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(5)
    inputs, targets = (torch.randn(SAMPLES, size, generator=generator) for size in (6, 2))
    return list(zip(inputs, targets, strict=True))


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Network(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=RATE)


def losses_in_plain_torch(seed: int = 42) -> list[float]:
    """The loss of each update of one process that knows no ranks: of 12 samples each, in the order of each epoch."""
    model, optimizer = model_and_optimizer()
    losses = []
    for epoch in range(EPOCHS):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for start in range(0, SAMPLES - SAMPLES % UPDATE, UPDATE):
            chosen = [data()[sample] for sample in order[start : start + UPDATE]]
            inputs, targets = (torch.stack(column) for column in zip(*chosen, strict=True))
            optimizer.zero_grad()
            loss = mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def losses(
    strategy: str, path: Path, micro: int = 3, save_after: int | None = None, resume: bool = False, **settings: Any
) -> list[float]:
    """The losses of the updates of one run, or of its first ``save_after``; what a rank does."""
    sizes = {"micro_train_batch_size": micro, "train_batch_size": UPDATE, **settings}
    made = get_strategy(StrategyConfig(strategy=strategy, device="cpu", bf16=False, max_norm=None, **sizes))
    with made:
        model, optimizer = model_and_optimizer()
        model, optimizer, _ = made.prepare((model, optimizer, None))
        loader: Any = made.setup_dataloader(data(), batch_size=micro)
        if resume:
            made.load_ckpt(model, path)
        seen: list[float] = []
        for epoch in range(loader.epoch, EPOCHS):
            loader.set_epoch(epoch)
            for inputs, targets in loader:
                made.backward(mse_loss(model(inputs), targets), model, optimizer)
                result = made.optimizer_step(optimizer, model)
                if result.applied:
                    assert result.loss is not None
                    seen.append(result.loss)
                if len(seen) == save_after:
                    made.save_ckpt(model, path)
                    return seen
        return seen


def require_plain(seen: list[float], skipped: int = 0) -> None:
    """Require the losses to be those of plain torch, without the first ``skipped``."""
    assert seen == pytest.approx(losses_in_plain_torch()[skipped:], rel=1e-5)
