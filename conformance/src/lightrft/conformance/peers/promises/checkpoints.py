"""Checkpoints: a run continues as if it had not been interrupted, and what is damaged is refused."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightrft.conformance.peers.protocol import TrainingLoop
from lightrft.conformance.peers.ranks import Differs, NotJudged, Ranks
from lightrft.conformance.peers.registry import promise
from lightrft.conformance.peers.training import (
    Items,
    adamw,
    copied,
    expect_weights,
    halving,
    micro_batch,
    micro_batches_of,
    reference,
    small_model,
    train_one,
)
from lightrft.conformance.peers.worker import Rank
from lightrft.conformance.values import Record


@promise("resume", "A run that is resumed from a checkpoint continues as if uninterrupted.")
def resume(ranks: Ranks) -> None:
    history, _ = reference(micro_batches_of(4, 1, ranks.world), optimizer="adamw")
    ranks.run(train_and_save, updates=2)
    for rank, weights in enumerate(ranks.run(load_and_train, first=2, updates=2)):
        expect_weights(history[-1], weights, f"rank {rank}, after 2 updates, a restart and 2 more")


@promise("resume-schedule", "A resumed run continues the schedule: it has the learning rates of one that goes on.")
def resume_schedule(ranks: Ranks) -> None:
    expected = ranks.run(save_and_continue)
    for rank, (want, got) in enumerate(zip(expected, ranks.run(load_and_continue), strict=True)):
        if got != want:
            raise Differs(f"rank {rank}: expected learning rates {want} after loading and an update, got {got}")


def save_and_continue(rank: Rank) -> list[float]:
    """Train twice, save, and train once more; the learning rates since."""
    loop = rank.loop()
    model = loop.prepare(small_model(), adamw, halving)
    for number in range(2):
        train_one(loop, model, micro_batch(number, rank.number))
    loop.save(rank.folder / "last", model, {})
    return _rates_of_an_update(rank, loop, model)


def load_and_continue(rank: Rank) -> list[float]:
    """Load into another model, and train once; the learning rates."""
    loop = rank.loop()
    model = loop.prepare(small_model(seed=5), adamw, halving)
    loop.load(rank.folder / "last", model)
    return _rates_of_an_update(rank, loop, model)


def _rates_of_an_update(rank: Rank, loop: TrainingLoop, model: nn.Module) -> list[float]:
    before = loop.learning_rate(model)
    train_one(loop, model, micro_batch(2, rank.number))
    rates = [before, loop.learning_rate(model)]
    loop.close()
    return rates


@promise("world-size", "A checkpoint of one number of ranks is resumed by another.", smallest_world=2)
def world_size(ranks: Ranks) -> None:
    for before, after in ((ranks.world, 1), (1, ranks.world)):
        ranks.begin()
        micro_batches = [*micro_batches_of(2, 1, before), *micro_batches_of(3, 1, after)[2:]]
        history, _ = reference(micro_batches, optimizer="adamw")
        ranks.run(train_and_save, updates=2, world=before)
        for rank, weights in enumerate(ranks.run(load_and_train, first=2, updates=1, world=after)):
            expect_weights(history[-1], weights, f"{before} ranks to {after}, rank {rank}, after another update")


def train_and_save(rank: Rank, *, updates: int) -> None:
    """Train and save."""
    loop = rank.loop()
    model = loop.prepare(small_model(), adamw)
    for number in range(updates):
        train_one(loop, model, micro_batch(number, rank.number))
    loop.save(rank.folder / "last", model, {"updates": updates})
    loop.close()


def load_and_train(rank: Rank, *, first: int, updates: int) -> Record:
    """Load into another model, and train; the weights."""
    loop = rank.loop()
    model = loop.prepare(small_model(seed=5), adamw)
    progress = loop.load(rank.folder / "last", model)
    if progress.get("updates") != first:
        raise Differs(f"expected the progress {{'updates': {first}}}, got {dict(progress)}")
    for number in range(first, first + updates):
        train_one(loop, model, micro_batch(number, rank.number))
    weights = copied(loop.weights(model))
    loop.close()
    return weights


@promise("resume-within-epoch", "A run that is resumed within a shuffled epoch sees the rest of it, in the same order.")
def resume_within_epoch(ranks: Ranks) -> None:
    whole = ranks.run(read_epoch, stop=None)
    ranks.begin()
    first = ranks.run(read_epoch, stop=2)
    rest = ranks.run(read_rest)
    for rank, expected in enumerate(whole):
        got = first[rank] + rest[rank]
        if got != expected:
            raise Differs(f"rank {rank}: expected the items {expected}, got {first[rank]}, then {rest[rank]}")


ITEMS, BATCH, EPOCH = 20, 2, 1
"""Of each rank; all are read in epoch 1."""


def read_epoch(rank: Rank, *, stop: int | None) -> Any:
    """Read ``stop`` batches, or all, and save."""
    loop = rank.loop()
    model = loop.prepare(small_model(), adamw)
    seen, consumed = [], 0
    for batch in loop.batches(_items(rank), batch_size=BATCH, shuffle=True, epoch=EPOCH):
        seen += batch.flatten().tolist()
        consumed += 1
        if consumed == stop:
            break
    loop.save(rank.folder / "last", model, {"consumed": consumed, "epoch": EPOCH})
    loop.close()
    return seen


def read_rest(rank: Rank) -> Any:
    """Load, and read the rest of the epoch."""
    loop = rank.loop()
    model = loop.prepare(small_model(), adamw)
    progress = loop.load(rank.folder / "last", model)
    position = {"epoch": progress["epoch"], "consumed": progress["consumed"]}
    batches = loop.batches(_items(rank), batch_size=BATCH, shuffle=True, **position)
    seen = [item for batch in batches for item in batch.flatten().tolist()]
    loop.close()
    return seen


def _items(rank: Rank) -> Any:
    return Items(torch.arange(ITEMS * rank.world))


@promise(
    "random-streams",
    "A resumed run draws the random numbers of PyTorch, NumPy and Python that an uninterrupted one would draw.",
)
def random_streams(ranks: Ranks) -> None:
    expected = ranks.run(save_and_draw)
    for rank, (want, got) in enumerate(zip(expected, ranks.run(load_and_draw), strict=True)):
        wrong = [name for name in want if want[name] != got[name]]
        if wrong:
            raise Differs(f"rank {rank}: other numbers from {', '.join(wrong)} after loading")


def save_and_draw(rank: Rank) -> Record:
    """Save, and draw the next numbers."""
    loop = rank.loop(random_streams=True)
    model = loop.prepare(small_model(), adamw)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + rank.number)
    _draw()
    loop.save(rank.folder / "last", model, {})
    drawn = _draw()
    loop.close()
    return drawn


def load_and_draw(rank: Rank) -> Record:
    """Load, and draw the next numbers."""
    loop = rank.loop(random_streams=True)
    model = loop.prepare(small_model(), adamw)
    loop.load(rank.folder / "last", model)
    drawn = _draw()
    loop.close()
    return drawn


def _draw() -> Record:
    return {"torch": torch.rand(1).item(), "numpy": float(np.random.rand()), "python": random.random()}


def checkpoint_files(folder: Path) -> list[Path]:
    """All files of a checkpoint, the largest first.

    Raises:
        NotJudged: There are none.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise NotJudged(f"nothing was saved under {folder.name}, the folder that was passed")
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)
