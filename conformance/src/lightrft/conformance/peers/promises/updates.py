"""What belongs to an update: accumulation, averaging over ranks, clipping, schedules."""

import torch

from lightrft.conformance.peers.ranks import Differs, Ranks
from lightrft.conformance.peers.registry import promise
from lightrft.conformance.peers.training import (
    RATE,
    ROWS,
    Items,
    copied,
    expect_weights,
    loss_of,
    micro_batch,
    micro_batches_of,
    reference,
    sgd,
    small_model,
    train,
    train_one,
)
from lightrft.conformance.peers.worker import Rank
from lightrft.conformance.values import Record


@promise("parity", "AdamW on several ranks computes what one process computes from all of their data.")
def parity(ranks: Ranks) -> None:
    history, _ = reference(micro_batches_of(5, 1, ranks.world), optimizer="adamw")
    for rank, seen in enumerate(ranks.run(train, updates=5, optimizer="adamw")):
        expect_weights(history[-1], seen["weights"][-1], f"rank {rank}, after 5 updates")


@promise("accumulation", "K micro-batches make the update of one large batch. Before the K-th, nothing changes.")
def accumulation(ranks: Ranks) -> None:
    history, _ = reference(micro_batches_of(3, 2, ranks.world))
    for rank, seen in enumerate(ranks.run(train, updates=3, accumulation_steps=2)):
        for number, got in enumerate(seen["weights"]):
            expect_weights(history[number // 2], got, f"rank {rank}, after micro-batch {number}, with K = 2")


@promise("clipping", "The gradient is clipped by its global norm, over all parameters and ranks.")
def clipping(ranks: Ranks) -> None:
    history, norms = reference(micro_batches_of(2, 2, ranks.world), max_norm=0.1)
    if min(norms) < 0.2:
        raise AssertionError(f"the gradients are too small to be clipped: {norms}")
    for rank, seen in enumerate(ranks.run(train, updates=2, accumulation_steps=2, max_norm=0.1)):
        expect_weights(history[-1], seen["weights"][-1], f"rank {rank}, after 2 clipped updates")


@promise("reported-norm", "The norm that is reported is that of the averaged gradient, before clipping.")
def reported_norm(ranks: Ranks) -> None:
    _, norms = reference(micro_batches_of(2, 2, ranks.world), max_norm=0.1)
    for rank, seen in enumerate(ranks.run(train, updates=2, accumulation_steps=2, max_norm=0.1)):
        if len(seen["norms"]) != len(norms):
            raise Differs(f"rank {rank}: expected {len(norms)} updates, got {len(seen['norms'])}")
        for want, got in zip(norms, seen["norms"], strict=True):
            if got is None or not abs(got - want) <= 1e-5 * want:
                raise Differs(f"rank {rank}: expected norm {want:.6f}, got {got}")


@promise("ranks-alike", "Ranks that built different models train the weights of rank 0.", smallest_world=2)
def ranks_alike(ranks: Ranks) -> None:
    history, _ = reference(micro_batches_of(2, 1, ranks.world))
    for rank, seen in enumerate(ranks.run(train, updates=2, seeds=(0, 1))):
        expect_weights(history[-1], seen["weights"][-1], f"rank {rank}, after 2 updates")


@promise("scheduler", "A scheduler steps once per update, on any number of ranks, with any K.")
def scheduler(ranks: Ranks) -> None:
    for rank, seen in enumerate(ranks.run(train, updates=3, accumulation_steps=2, schedule=True)):
        if abs(seen["rate"] - RATE / 8) > 1e-9:
            raise Differs(f"rank {rank}: expected learning rate {RATE / 8} (halved 3 times), got {seen['rate']}")


@promise(
    "short-window",
    "If the data ends before the K-th micro-batch, the update is the mean over the micro-batches since the last update.",
)
def short_window(ranks: Ranks) -> None:
    rows = _rows(3 * ranks.world)
    whole = 2 * ranks.world * ROWS
    history, _ = reference([[rows[:whole]], [rows[whole:]]])
    for rank, weights in enumerate(ranks.run(train_epoch, accumulation_steps=2)):
        expect_weights(history[-1], weights, f"rank {rank}, after an update of 2 micro-batches and one of 1")


def _rows(batches: int) -> torch.Tensor:
    return torch.cat([micro_batch(number, 0) for number in range(batches)])


def train_epoch(rank: Rank, *, accumulation_steps: int) -> Record:
    """Train on 3 batches per rank, from the library's loader."""
    loop = rank.loop(accumulation_steps=accumulation_steps)
    model = loop.prepare(small_model(), sgd)
    count = 3
    dataset = Items(_rows(count * rank.world))
    for number, batch in enumerate(loop.batches(dataset, batch_size=ROWS)):
        train_one(loop, model, batch, last=number == count - 1)
    weights = copied(loop.weights(model))
    loop.close()
    return weights


@promise("models-in-turn", "Two models that train in turn each accumulate their own K micro-batches.")
def models_in_turn(ranks: Ranks) -> None:
    history, _ = reference(micro_batches_of(2, 2, ranks.world))
    for rank, seen in enumerate(ranks.run(train_in_turn)):
        for name in ("a", "b"):
            expect_weights(history[-1], seen[name], f"rank {rank}, model {name}, updated at steps {seen['updates']}")


def train_in_turn(rank: Rank) -> Record:
    """Train models a and b on the same data: a, b, a, b."""
    loop = rank.loop(accumulation_steps=2)
    models = {name: loop.prepare(small_model(), sgd) for name in ("a", "b")}
    updates = []
    for number in range(4):
        for name, model in models.items():
            if train_one(loop, model, micro_batch(number, rank.number)):
                updates.append(f"{name}{number + 1}")
    weights = {name: copied(loop.weights(model)) for name, model in models.items()}
    loop.close()
    return {**weights, "updates": updates}


@promise("evaluation", "An evaluation between micro-batches, without gradients, changes no update.")
def evaluation(ranks: Ranks) -> None:
    history, _ = reference(micro_batches_of(2, 2, ranks.world))
    for rank, weights in enumerate(ranks.run(train_with_evaluation)):
        expect_weights(history[-1], weights, f"rank {rank}, after 2 updates with evaluations")


def train_with_evaluation(rank: Rank) -> Record:
    """Evaluate after each micro-batch."""
    loop = rank.loop(accumulation_steps=2)
    model = loop.prepare(small_model(), sgd)
    for number in range(4):
        train_one(loop, model, micro_batch(number, rank.number))
        model.eval()
        with torch.no_grad():
            loss_of(model, micro_batch(100 + number, rank.number))
        model.train()
    weights = copied(loop.weights(model))
    loop.close()
    return weights


@promise("two-forwards", "A loss may come from two calls of the model, as in preference training.")
def two_forwards(ranks: Ranks) -> None:
    history, _ = reference(micro_batches_of(2, 1, ranks.world), loss=preference)
    for rank, weights in enumerate(ranks.run(train_preferences)):
        expect_weights(history[-1], weights, f"rank {rank}, after 2 updates")


def preference(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """A loss of two calls: the first half is preferred to the second."""
    chosen, rejected = (model(half[:, :-1]) for half in batch.chunk(2))
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def train_preferences(rank: Rank) -> Record:
    """Two updates of `preference`."""
    loop = rank.loop()
    model = loop.prepare(small_model(), sgd)
    for number in range(2):
        with loop.micro_batch(model):
            loop.backward(preference(model, micro_batch(number, rank.number)), model)
            loop.step(model)
    weights = copied(loop.weights(model))
    loop.close()
    return weights


@promise("two-backwards", "Two backward passes through one graph (retain_graph) add up, and the ranks stay identical.")
def two_backwards(ranks: Ranks) -> None:
    history, _ = reference(micro_batches_of(2, 1, ranks.world), loss=lambda model, batch: sum(losses(model, batch)))  # type: ignore[arg-type, return-value]
    for rank, weights in enumerate(ranks.run(train_backwards)):
        expect_weights(history[-1], weights, f"rank {rank}, after 2 updates")


def losses(model: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two losses from one call."""
    output = model(batch[:, :-1])
    return (output - batch[:, -1:]).square().mean(), output.abs().mean()


def train_backwards(rank: Rank) -> Record:
    """Two backward passes per update."""
    loop = rank.loop()
    model = loop.prepare(small_model(), sgd)
    for number in range(2):
        with loop.micro_batch(model):
            first, second = losses(model, micro_batch(number, rank.number))
            loop.backward(first, model, retain_graph=True)
            loop.backward(second, model)
            loop.step(model)
    weights = copied(loop.weights(model))
    loop.close()
    return weights


@promise("nan", "If the loss of one rank is NaN, the update is skipped on every rank, or every rank raises.")
def nan(ranks: Ranks) -> None:
    micro_batches = micro_batches_of(3, 1, ranks.world)
    skipped, _ = reference([micro_batches[0], micro_batches[2]], max_norm=1.0)
    outcomes = ranks.attempt(train_with_nan)
    if all(outcome.refused for outcome in outcomes):
        return
    for rank, outcome in enumerate(outcomes):
        if not outcome.finished:
            raise Differs(f"rank {rank} {outcome}, not every rank")
        expect_weights(skipped[-1], outcome.result, f"rank {rank}, after an update with NaN and another")


def train_with_nan(rank: Rank) -> Record:
    """Three updates, the second with NaN on the last rank."""
    loop = rank.loop(max_norm=1.0)
    model = loop.prepare(small_model(), sgd)
    train_one(loop, model, micro_batch(0, rank.number))
    with rank.may_refuse():
        train_one(loop, model, micro_batch(1, rank.number) * (float("nan") if rank.number == rank.world - 1 else 1.0))
    train_one(loop, model, micro_batch(2, rank.number))
    weights = copied(loop.weights(model))
    loop.close()
    return weights
