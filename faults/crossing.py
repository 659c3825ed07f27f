"""Every strategy and world size saves; every other loads that and trains on, and must come to the same weights.

`python faults/crossing.py` takes a pair of each kind; `--all` takes all pairs of {fake, fsdp, hsdp, zero0 to 3} x
{1, 2, 3 ranks}. Right after loading, the weights must be those that were saved, bit for bit; three updates later
they may differ from the uninterrupted run's by 5e-5 of the total update, which is what summation order comes to.
"""

import argparse
import sys
import time
from collections.abc import Mapping

import torch
from cells import LOOK, Cell, Failed, Groups, cells, groups, setup, train

BOUND = 5e-5
UPDATES = 3
Weights = Mapping[str, torch.Tensor]

SHORT = [
    ("fsdp", 2, "zero3", 1), ("zero3", 2, "fake", 1), ("fake", 1, "fsdp", 2), ("fake", 1, "zero1", 2),
    ("zero1", 2, "fsdp", 1), ("zero2", 2, "hsdp", 2), ("hsdp", 2, "zero0", 1), ("fsdp", 2, "zero2", 2),
    ("zero0", 2, "zero3", 2), ("fsdp", 3, "zero1", 2), ("zero3", 2, "fsdp", 3), ("zero1", 3, "zero3", 2),
]  # fmt: skip


def save(own: Groups, cell: Cell) -> tuple[Weights, Weights, Weights]:
    """Train, save to a store of the cell's own, train on; the weights at first, as saved, and in the end."""
    store = f"{cell.strategy}-{cell.world}"
    operations = [LOOK, train(0, UPDATES), {"do": "save", "model": "a", "tag": "t", "store": store}]
    seen = own.run(cell, [*setup(), *operations, LOOK, train(UPDATES, UPDATES), LOOK])[0]
    return seen[4], seen[7], seen[9]


def load(own: Groups, source: Cell, target: Cell) -> tuple[Weights, Weights]:
    """Load what ``source`` saved and train on; the weights as loaded, and in the end."""
    load_it = {"do": "load", "model": "a", "tag": "t", "store": f"{source.strategy}-{source.world}"}
    seen = own.run(target, [*setup(seed=2), load_it, LOOK, train(UPDATES, UPDATES), LOOK])[0]
    return seen[5], seen[7]


def norm(weights: Weights, other: Weights) -> float:
    """2-norm of the difference over the whole model."""
    return sum(float((weights[it].double() - other[it].double()).pow(2).sum()) for it in other) ** 0.5


def cross(pairs: list[tuple[Cell, Cell]]) -> int:
    """Try ``pairs``; returns how many are wrong."""
    wrong, worst, begun = 0, 0.0, time.monotonic()
    with groups() as own:
        own.run(Cell("fake", 1), [{"do": "empty_disk"}])
        saved = {source: save(own, source) for source in dict.fromkeys(source for source, _ in pairs)}
        for source, target in pairs:
            first, kept, end = saved[source]
            try:
                loaded, trained = load(own, source, target)
            except Failed as error:
                wrong += 1
                print(f"FAIL {source} -> {target}: {error}", flush=True)
                continue
            difference = norm(trained, end) / norm(end, first)
            exact = all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())
            worst = max(worst, difference)
            if not exact or difference > BOUND:
                wrong += 1
                print(
                    f"FAIL {source} -> {target}: exact when loaded: {exact}, then off by {difference:.2g}", flush=True
                )
        own.run(Cell("fake", 1), [{"do": "empty_disk", "keep": False}])
    seconds = time.monotonic() - begun
    print(
        f"{len(pairs)} pairs, {wrong} wrong, at most {worst:.2g} of the update apart (bound {BOUND:g}); {seconds:.0f} s"
    )
    return wrong


def main() -> None:
    """Cross, and end with status 1 where a pair is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all pairs, for the night")
    everything = cells()
    if parser.parse_args().all:
        pairs = [(source, target) for source in everything for target in everything]
    else:
        pairs = [(Cell(*it[:2]), Cell(*it[2:])) for it in SHORT]
    sys.exit(1 if cross(pairs) else 0)


if __name__ == "__main__":
    main()
