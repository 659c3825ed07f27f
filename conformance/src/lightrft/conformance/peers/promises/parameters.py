"""Frozen and unused parameters."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from lightrft.conformance.peers.ranks import Differs, Outcome, Ranks
from lightrft.conformance.peers.registry import promise
from lightrft.conformance.peers.training import (
    FEATURES,
    OPTIMIZERS,
    Layer,
    Weights,
    copied,
    expect_weights,
    loss_of,
    micro_batch,
    seeded,
    sgd,
    small_model,
    train_one,
)
from lightrft.conformance.peers.worker import Rank
from lightrft.conformance.values import Record


@promise("frozen", "Parameters that are frozen before preparing never change; the others train.")
def frozen(ranks: Ranks) -> None:
    expect_training(
        ranks, ranks.attempt(train_freezing, trainable=[False, False, False], optimizer="adamw"), [False] * 3, "adamw"
    )


@promise(
    "unfrozen-later",
    "Parameters may be unfrozen between updates: the others are trained as in plain PyTorch, or the change is refused.",
)
def unfrozen_later(ranks: Ranks) -> None:
    plan = [False, True, True]
    expect_training(ranks, ranks.attempt(train_freezing, trainable=plan), plan, may_refuse=True)


@promise("frozen-later", "Parameters may be frozen between updates, or the change is refused.")
def frozen_later(ranks: Ranks) -> None:
    plan = [True, False, False]
    expect_training(ranks, ranks.attempt(train_freezing, trainable=plan), plan, may_refuse=True)


def train_freezing(rank: Rank, *, trainable: Sequence[bool], optimizer: str = "sgd") -> Record:
    """An update for each entry of ``trainable``: whether the first layer is trainable then."""
    loop = rank.loop(unused_parameters=True)
    module = small_model()
    _set_trainable(module, trainable[0])
    model = loop.prepare(module, OPTIMIZERS[optimizer])
    for number, value in enumerate(trainable):
        with rank.may_refuse() if value != trainable[0] else nullcontext():
            _set_trainable(module, value)
            train_one(loop, model, micro_batch(number, rank.number))
    weights = copied(loop.weights(model))
    loop.close()
    return weights


def _set_trainable(module: nn.Module, value: bool) -> None:
    for parameter in module.get_submodule("first").parameters():
        parameter.requires_grad_(value)


def expect_training(
    ranks: Ranks,
    outcomes: Sequence[Outcome],
    trainable: Sequence[bool],
    optimizer: str = "sgd",
    *,
    may_refuse: bool = False,
) -> None:
    """Compare with one process."""
    if may_refuse and all(outcome.refused for outcome in outcomes):
        return
    module = small_model()
    steps = OPTIMIZERS[optimizer](module.parameters())
    for number, value in enumerate(trainable):
        _set_trainable(module, value)
        steps.zero_grad()
        torch.stack([loss_of(module, micro_batch(number, rank)) for rank in range(ranks.world)]).mean().backward()
        steps.step()
    expect_outcomes(outcomes, module.state_dict(), f"after {len(trainable)} updates")


def expect_outcomes(outcomes: Sequence[Outcome], expected: Weights, where: str) -> None:
    """Every rank finished with the expected weights. Raises `Differs`."""
    for rank, outcome in enumerate(outcomes):
        if not outcome.finished:
            raise Differs(f"rank {rank} {outcome}")
        expect_weights(expected, outcome.result, f"rank {rank}, {where}")


class TwoHeads(nn.Module):
    """A model whose second head may be left out."""

    _no_split_modules = ["Layer"]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(FEATURES, 1), Layer(FEATURES, 1)

    def forward(self, features: torch.Tensor, second: bool) -> torch.Tensor:
        """The sum of the heads in use."""
        output: torch.Tensor = self.first(features)
        return output + self.second(features) if second else output


@promise("unused", "With plain SGD, a module that no rank uses in an update does not change, and the others train.")
def unused(ranks: Ranks) -> None:
    _expect_heads(ranks, [[False] * ranks.world, [True] * ranks.world, [False] * ranks.world])


@promise(
    "unused-on-a-rank",
    "A module that only some ranks use gets the mean of the gradients, with 0 for the others.",
    smallest_world=2,
)
def unused_on_a_rank(ranks: Ranks) -> None:
    _expect_heads(ranks, [[rank == 0 for rank in range(ranks.world)]] * 2)


def _expect_heads(ranks: Ranks, plan: Sequence[Sequence[bool]]) -> None:
    model = seeded(TwoHeads)
    steps = sgd(model.parameters())
    for number, by_rank in enumerate(plan):
        steps.zero_grad()
        values = [head_loss(model, micro_batch(number, rank), second) for rank, second in enumerate(by_rank)]
        torch.stack(values).mean().backward()
        steps.step()
    outcomes = ranks.attempt(train_heads, plan=[list(row) for row in plan], seconds=30.0)
    expect_outcomes(outcomes, model.state_dict(), f"after {len(plan)} updates")


def head_loss(model: nn.Module, batch: torch.Tensor, second: bool) -> torch.Tensor:
    """The mean squared error."""
    loss: torch.Tensor = (model(batch[:, :FEATURES], second) - batch[:, FEATURES:]).square().mean()
    return loss


def train_heads(rank: Rank, *, plan: Sequence[Sequence[bool]]) -> Record:
    """An update for each row of ``plan``: whether each rank uses the second head."""
    loop = rank.loop(unused_parameters=True)
    model = loop.prepare(seeded(TwoHeads), sgd)
    for number, by_rank in enumerate(plan):
        with loop.micro_batch(model):
            loop.backward(head_loss(model, micro_batch(number, rank.number), by_rank[rank.number]), model)
            loop.step(model)
    weights = copied(loop.weights(model))
    loop.close()
    return weights
