"""The models and data of the promises, a program that trains on them, and plain PyTorch in one process to compare with."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset

from lightrft.conformance.peers.protocol import TrainingLoop, Update
from lightrft.conformance.peers.ranks import Differs
from lightrft.conformance.peers.worker import Rank
from lightrft.conformance.values import Record

FEATURES, ROWS = 4, 4
"""Of a micro-batch: an input has one feature more, the value to predict."""
RATE = 0.1
TOLERANCE = 1e-6
"""Largest difference of a weight that rounding explains: the weights are below 1, and there are few updates."""

Weights = Mapping[str, torch.Tensor]


class Items(Dataset[torch.Tensor]):
    """A dataset of the rows of a tensor."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


class Layer(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Tanh of the linear map."""
        return torch.tanh(self.linear(inputs))


class SmallModel(nn.Module):
    """Two layers."""

    _no_split_modules = ["Layer"]
    """As models of transformers name the classes that are sharded one by one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = Layer(FEATURES, width), nn.Linear(width, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """One output per row."""
        output: torch.Tensor = self.second(self.first(features))
        return output


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with the weights of a seed; other random numbers are drawn as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def small_model(seed: int = 0) -> nn.Module:
    """A `SmallModel` with the weights of a seed."""
    return seeded(SmallModel, seed)


def micro_batch(number: int, rank: int) -> torch.Tensor:
    """The ``number``-th micro-batch of a rank, (ROWS, FEATURES + 1)."""
    generator = torch.Generator().manual_seed(1009 * number + rank)
    return torch.randn(ROWS, FEATURES + 1, generator=generator)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The mean squared error."""
    loss: torch.Tensor = (model(batch[:, :FEATURES]) - batch[:, FEATURES:]).square().mean()
    return loss


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain SGD: unlike Adam's, its updates show the scale of the gradient."""
    return torch.optim.SGD(parameters, lr=RATE)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer with state; a large eps, so that it does not amplify the rounding of small gradients."""
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, weight_decay=0.1)


def halving(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Halves the learning rate at each step."""
    return LambdaLR(optimizer, lambda step: 0.5**step)


# On a rank


def copied(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights as they are now."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def train_one(loop: TrainingLoop, model: nn.Module, batch: torch.Tensor, *, last: bool = False) -> Update | None:
    """One micro-batch; the update, or None before the K-th."""
    with loop.micro_batch(model, last=last):
        loop.backward(loss_of(model, batch), model)
        return loop.step(model)


def train(
    rank: Rank,
    *,
    updates: int,
    optimizer: str = "sgd",
    seeds: Sequence[int] = (0, 0),
    schedule: bool = False,
    **settings: Any,
) -> Record:
    """Train the small model; the weights before and after each micro-batch, the norms, and the last learning rate.

    Args:
        rank: This rank.
        updates: The number of updates.
        optimizer: A name in `OPTIMIZERS`.
        seeds: Of the model that each rank builds.
        schedule: Whether there is a scheduler, `halving`.
        settings: Those of the loop.
    """
    loop = rank.loop(**settings)
    steps = settings.get("accumulation_steps", 1)
    model = loop.prepare(small_model(seeds[rank.number % 2]), OPTIMIZERS[optimizer], halving if schedule else None)
    history, norms = [copied(loop.weights(model))], []
    for number in range(updates * steps):
        update = train_one(loop, model, micro_batch(number, rank.number))
        history.append(copied(loop.weights(model)))
        norms += [update.norm] if update else []
    rate = loop.learning_rate(model)
    loop.close()
    return {"weights": history, "norms": norms, "rate": rate}


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


# In one process, without any library


def reference(
    updates: Sequence[Sequence[torch.Tensor]],
    *,
    model: nn.Module | None = None,
    optimizer: str = "sgd",
    schedule: bool = False,
    max_norm: float | None = None,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = loss_of,
) -> tuple[list[Weights], list[float]]:
    """Plain PyTorch: each update is made from the mean of the losses of its micro-batches.

    Returns:
        The weights before and after each update, and the norm of each gradient.
    """
    trained = model or small_model()
    steps = OPTIMIZERS[optimizer](trained.parameters())
    scheduler = halving(steps) if schedule else None
    history: list[Weights] = [copied(trained.state_dict())]
    norms: list[float] = []
    for micro_batches in updates:
        steps.zero_grad()
        torch.stack([loss(trained, batch) for batch in micro_batches]).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained.parameters(), max_norm or float("inf"))))
        steps.step()
        if scheduler:
            scheduler.step()
        history.append(copied(trained.state_dict()))
    return history, norms


def micro_batches_of(updates: int, steps: int, world: int) -> list[list[torch.Tensor]]:
    """What all ranks train on in each update of `train`."""
    return [
        [micro_batch(update * steps + step, rank) for step in range(steps) for rank in range(world)]
        for update in range(updates)
    ]


def expect_weights(expected: Weights, got: Weights, where: str, tolerance: float = TOLERANCE) -> None:
    """Compare weights by name. Raises `Differs`."""
    if expected.keys() != got.keys():
        raise Differs(f"{where}: expected weights named {sorted(expected)}, got {sorted(got)}")
    for name, want in expected.items():
        if got[name].shape != want.shape:
            raise Differs(f"{where}: {name} has the shape {tuple(got[name].shape)}, expected {tuple(want.shape)}")
    distances = {name: float((got[name].double() - expected[name].double()).abs().max()) for name in expected}
    name = max(distances, key=lambda each: distances[each] if distances[each] == distances[each] else float("inf"))
    if not distances[name] <= tolerance:
        raise Differs(f"{where}: {name} is {distances[name]:.2g} off (allowed: {tolerance:.0e})")
