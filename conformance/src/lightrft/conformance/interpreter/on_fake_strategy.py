"""Operations that train, save and load the same on the strategy under test and on FakeStrategy."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.conformance import models
from lightrft.conformance.interpreter.disk import disk
from lightrft.conformance.interpreter.session import Session, operation
from lightrft.strategy import FakeStrategy, StrategyBase, StrategyConfig
from lightrft.strategy.backend import World
from lightrft.strategy.fake_strategy import FakeBackend

GLOBAL_ROWS = 12
"""Rows of one update over all ranks; divisible by 1, 2, 3, 4, 6 and 12 ranks."""


@operation
def train_shared(session: Session, model: str, first: int, count: int = 1) -> None:
    """Make ``count`` updates, each from the same `GLOBAL_ROWS` rows for any number of ranks."""
    entry = session.models[model]
    _train(session.strategy, entry.model, session.optimizer(model), entry.scheduler, first, count)


def _train(
    strategy: StrategyBase,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    first: int,
    count: int,
) -> None:
    rank, ranks = strategy.get_rank(), strategy.world_size
    share = slice(rank * GLOBAL_ROWS // ranks, (rank + 1) * GLOBAL_ROWS // ranks)
    language = models.is_language(strategy.unwrap_model(model))
    for number in range(first, first + count):
        inputs, targets = models.batch(number, 0, GLOBAL_ROWS, language)
        loss = models.loss_of(model, inputs[share].to(strategy.device), targets[share].to(strategy.device))
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model, scheduler, boundary=True)


class AloneBackend(FakeBackend):
    """FakeStrategy's, on one of several ranks."""

    @classmethod
    @override
    def join(cls, config: StrategyConfig) -> World:
        return World.alone(config)


class Alone(FakeStrategy):
    """FakeStrategy on one of several ranks."""

    backend_class = AloneBackend


@operation
def on_fake_strategy(
    session: Session, kind: str, seed: int, first: int = 0, count: int = 0, load_from: str | None = None,
    save_to: str | None = None, lr: float = 1e-3, samples: int = 12, batches: int = 0,
) -> dict[str, object]:  # fmt: skip
    """On rank 0, build, optionally load, train and optionally save a model on FakeStrategy.

    ``samples``: the length of a data loader, of which ``batches`` of two samples are used in epoch 1.

    Returns:
        The weights, and the other samples of the epoch.
    """
    if session.rank != 0:
        return {}
    with _fake_strategy(session) as fake:
        model = models.build(kind, seed)
        optimizer = fake.create_optimizer(model, lr=lr, weight_decay=0.01)
        fake.prepare((model, optimizer, None))
        loader: Any = fake.setup_dataloader(list(range(samples)), 2, shuffle=True, drop_last=True)
        loader.set_epoch(1)
        for _ in zip(range(batches), loader, strict=False):
            pass
        if load_from is not None:
            fake.load_ckpt(model, disk() / load_from, load_lr_scheduler_states=False)
        _train(fake, model, optimizer, None, first, count)
        if save_to is not None:
            fake.save_ckpt(model, disk() / save_to, tag="t")
        loader.set_epoch(loader.epoch)
        weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        return {"weights": weights, "rest": [int(sample) for batch in loader for sample in batch]}


@operation
def order_on_fake_strategy(session: Session, samples: int, epochs: list[int]) -> list[list[int]]:
    """On rank 0, the order of the numbers 0 to ``samples`` - 1 in each epoch on FakeStrategy."""
    if session.rank != 0:
        return []
    with _fake_strategy(session) as fake:
        loader: Any = fake.setup_dataloader(list(range(samples)), 1, shuffle=True, drop_last=False)
        orders = []
        for epoch in epochs:
            loader.set_epoch(epoch)
            orders.append([int(batch) for batch in loader])
        return orders


@contextlib.contextmanager
def _fake_strategy(session: Session) -> Iterator[FakeStrategy]:
    """A FakeStrategy with the settings of the program."""
    from lightrft.strategy.telemetry.log import set_rank

    shared = {"bf16", "max_norm", "adam_betas", "seed"}
    fake = Alone(
        StrategyConfig(
            strategy="fake", device="cpu", train_batch_size=GLOBAL_ROWS, micro_train_batch_size=GLOBAL_ROWS,
            **{name: value for name, value in session.settings.items() if name in shared},
        )
    )  # fmt: skip
    try:
        yield fake
    finally:
        fake.close()
        set_rank(session.rank)
