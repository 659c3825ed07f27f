"""Collectives that scripts call, and loaders."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightrft.conformance.peers.protocol import ReduceOp
from lightrft.conformance.peers.ranks import Differs, Ranks
from lightrft.conformance.peers.registry import promise
from lightrft.conformance.peers.training import Items
from lightrft.conformance.peers.worker import Rank
from lightrft.conformance.values import Record

Number = int | float
LARGE = 2**40


@promise("reduce-values", "A dict of numbers is combined over the ranks by value: 1 and 2 have the mean 1.5.")
def reduce_values(ranks: Ranks) -> None:
    total = sum(range(1, ranks.world + 1))
    for op, size in (("sum", 1), ("mean", ranks.world)):
        _expect_values(ranks, op, {"count": total / size, "loss": 0.5 * ranks.world / size})


@promise("reduce-large", "Sums of integers are exact, also of those near 2^40, such as counts of tokens.")
def reduce_large(ranks: Ranks) -> None:
    _expect_values(ranks, "sum", {"large": LARGE * ranks.world + sum(range(1, ranks.world + 1))})


def _expect_values(ranks: Ranks, op: str, expected: Mapping[str, Number]) -> None:
    for rank, got in enumerate(ranks.run(reduce_numbers, op=op, names=list(expected))):
        values = {name: value for name, (_, value) in got.items()}
        if values != expected:
            raise Differs(f"rank {rank}: expected the {op} {dict(expected)}, got {values}")


@promise("reduce-types", "Python numbers stay Python numbers: sums of integers are int, means are float.")
def reduce_types(ranks: Ranks) -> None:
    for op, count in (("sum", "int"), ("mean", "float")):
        expected = {"count": count, "loss": "float"}
        for rank, got in enumerate(ranks.run(reduce_numbers, op=op, names=list(expected))):
            types = {name: kind for name, (kind, _) in got.items()}
            if types != expected:
                raise Differs(f"rank {rank}: expected a {op} of the types {expected}, got {types}")


def reduce_numbers(rank: Rank, *, op: ReduceOp, names: Sequence[str]) -> Record:
    """What all_reduce makes of a dict of numbers: the name of the type and the value of each."""
    loop = rank.loop()
    numbers = {"count": rank.number + 1, "loss": 0.5, "large": LARGE + rank.number + 1}
    combined = loop.all_reduce({name: numbers[name] for name in names}, op)
    loop.close()
    return {
        name: [type(value).__name__, value if isinstance(value, (int, float)) else value.tolist()]
        for name, value in combined.items()
    }


@promise("reduce-argument", "Combining a tensor over the ranks leaves the argument as it is.", smallest_world=2)
def reduce_argument(ranks: Ranks) -> None:
    total = float(sum(range(1, ranks.world + 1)))
    for rank, (before, after, result) in enumerate(ranks.run(reduce_tensor)):
        if result != total:
            raise Differs(f"rank {rank}: expected the sum {total}, got {result}")
        if after != before:
            raise Differs(f"rank {rank}: the argument was {before}, and is {after} after the call")


def reduce_tensor(rank: Rank) -> Any:
    """The argument before and after the call, and the result."""
    loop = rank.loop()
    value = torch.tensor([float(rank.number + 1)])
    before = float(value)
    result = float(loop.all_reduce(value, "sum"))
    loop.close()
    return before, float(value), result


@promise("gather-uneven", "Tensors with different numbers of rows are gathered in rank order.", smallest_world=2)
def gather_uneven(ranks: Ranks) -> None:
    expected = [float(rank) for rank in range(ranks.world) for _ in range(rank + 1)]
    for rank, got in enumerate(ranks.run(gather_rows)):
        if got != expected:
            raise Differs(f"rank {rank}: expected rows {expected}, got {got}")


def gather_rows(rank: Rank) -> Any:
    """Each rank has as many rows as its number plus one."""
    loop = rank.loop()
    rows = loop.all_gather(torch.full((rank.number + 1, 1), float(rank.number)))
    loop.close()
    return rows.flatten().tolist()


@promise("data-once", "In an epoch, the ranks together see every item once.")
def data_once(ranks: Ranks) -> None:
    items = 12 * ranks.world
    _expect_once(items, ranks.run(read, items=items, epochs=[0], shuffle=False), repeats=0)


@promise(
    "data-rest",
    "If items do not divide evenly, none is lost, and fewer are repeated than there are ranks.",
    smallest_world=2,
)
def data_rest(ranks: Ranks) -> None:
    items = 12 * ranks.world + 1
    _expect_once(items, ranks.run(read, items=items, epochs=[0], shuffle=False), repeats=ranks.world - 1)


@promise("data-epochs", "With shuffling, every epoch has a different order and yields every item exactly once.")
def data_epochs(ranks: Ranks) -> None:
    items = 12 * ranks.world
    seen = ranks.run(read, items=items, epochs=[0, 1], shuffle=True)
    for epoch in range(2):
        _expect_once(items, [[by_rank[epoch]] for by_rank in seen], repeats=0)
    if seen[0][0] == seen[0][1]:
        raise Differs(f"rank 0 sees the same order in both epochs: {seen[0][0]}")


def _expect_once(items: int, seen: list[list[list[int]]], repeats: int) -> None:
    flat = [item for by_rank in seen for epoch in by_rank for item in epoch]
    missing = sorted(set(range(items)) - set(flat))
    if missing or len(flat) - items > repeats:
        raise Differs(
            f"of {items} items, {len(missing)} are missing {missing}, and {len(flat) - len(set(flat))} are repeated"
        )


def read(rank: Rank, *, items: int, epochs: list[int], shuffle: bool) -> Any:
    """The items that this rank sees in each epoch, in batches of 4."""
    loop = rank.loop()
    dataset = Items(torch.arange(items))
    seen = [
        [int(item) for batch in loop.batches(dataset, batch_size=4, shuffle=shuffle, epoch=epoch) for item in batch]
        for epoch in epochs
    ]
    loop.close()
    return seen
