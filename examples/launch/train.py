"""A few updates of a small model on every rank of every host; rank 0 prints what they came to."""

import argparse
import hashlib

import torch
from torch import nn

from lightrft.strategy import StrategyConfig, get_strategy


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = hidden + torch.tanh(self.linear(hidden))
        return result


class Model(nn.Module):
    """Four of them, and a head."""

    _no_split_modules = ["Layer"]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[Layer() for _ in range(4)])
        self.head = nn.Linear(16, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.layers(inputs))
        return result


def main() -> None:
    parser = StrategyConfig.add_arguments(argparse.ArgumentParser(description=__doc__))
    parser.set_defaults(
        strategy="fsdp", bf16=False, train_batch_size=8, micro_train_batch_size=4, max_norm=None, timeout=60.0
    )
    with get_strategy(parser.parse_args()) as strategy:
        model = Model()
        optimizer = strategy.create_optimizer(model, lr=1e-2)
        model, optimizer, _ = strategy.prepare((model, optimizer, None))
        for step in range(20):
            rows = torch.randn(8, 17, generator=torch.Generator().manual_seed(step))
            for batch in rows.split(strategy.config.micro_train_batch_size)[strategy.get_rank() :: strategy.world_size]:
                batch = batch.to(strategy.device)
                loss = nn.functional.mse_loss(model(batch[:, :16]), batch[:, 16:])
                strategy.backward(loss, model, optimizer)
                strategy.optimizer_step(optimizer, model)
        digest = hashlib.sha256()
        for bucket in strategy.full_parameters(model):
            for _, tensor in bucket:
                digest.update(tensor.cpu().numpy().tobytes())
        strategy.print(f"{strategy.world_size} ranks, weights {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
