"""Save a checkpoint in one strategy and world size, load it in another, train on, and compare the weights.

`python faults/crossing.py` runs a selection of pairs; `--all` runs all pairs of {fake, fsdp, hsdp, zero0 to 3} x
{1, 2, 3 ranks}. After loading, the weights must equal the saved ones bit for bit. Three updates later they may differ from
those of the uninterrupted run by 5e-5 of the total update: floating-point summation order.
"""

import argparse
import sys
import time
from collections.abc import Mapping

import torch
from cells import LOOK, Cell, Failed, Groups, cells, open_groups, setup, train

BOUND = 5e-5
UPDATES = 3
Weights = Mapping[str, torch.Tensor]

SHORT = [
    ("fsdp", 2, "zero3", 1), ("zero3", 2, "fake", 1), ("fake", 1, "fsdp", 2), ("fake", 1, "zero1", 2),
    ("zero1", 2, "fsdp", 1), ("zero2", 2, "hsdp", 2), ("hsdp", 2, "zero0", 1), ("fsdp", 2, "zero2", 2),
    ("zero0", 2, "zero3", 2), ("fsdp", 3, "zero1", 2), ("zero3", 2, "fsdp", 3), ("zero1", 3, "zero3", 2),
]  # fmt: skip


def save(groups: Groups, cell: Cell) -> tuple[Weights, Weights, Weights]:
    """Train, save to the cell's store, train on. Returns the weights at the start, as saved, and at the end."""
    store = f"{cell.strategy}-{cell.world}"
    operations = [LOOK, train(0, UPDATES), {"do": "save", "model": "a", "tag": "t", "store": store}]
    observations = groups.run(cell, [*setup(), *operations, LOOK, train(UPDATES, UPDATES), LOOK])[0]
    return observations[4], observations[7], observations[9]


def load(groups: Groups, source: Cell, target: Cell) -> tuple[Weights, Weights]:
    """Load the checkpoint of ``source`` and train on. Returns the weights as loaded, and at the end."""
    operation = {"do": "load", "model": "a", "tag": "t", "store": f"{source.strategy}-{source.world}"}
    observations = groups.run(target, [*setup(seed=2), operation, LOOK, train(UPDATES, UPDATES), LOOK])[0]
    return observations[5], observations[7]


def norm(weights: Weights, other: Weights) -> float:
    """2-norm of the difference, over all weights."""
    return sum(float((weights[name].double() - other[name].double()).pow(2).sum()) for name in other) ** 0.5


def cross(pairs: list[tuple[Cell, Cell]]) -> int:
    """Run ``pairs``; returns the number of wrong ones."""
    wrong, worst, start = 0, 0.0, time.monotonic()
    with open_groups() as groups:
        groups.run(Cell("fake", 1), [{"do": "empty_disk"}])
        saved = {source: save(groups, source) for source in dict.fromkeys(source for source, _ in pairs)}
        for source, target in pairs:
            first, expected, end = saved[source]
            try:
                loaded, trained = load(groups, source, target)
            except Failed as error:
                wrong += 1
                print(f"FAIL {source} -> {target}: {error}", flush=True)
                continue
            difference = norm(trained, end) / norm(end, first)
            exact = all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
            worst = max(worst, difference)
            if not exact or difference > BOUND:
                wrong += 1
                print(
                    f"FAIL {source} -> {target}: loaded exactly: {exact}; at the end off by {difference:.2g}",
                    flush=True,
                )
        groups.run(Cell("fake", 1), [{"do": "empty_disk", "keep": False}])
    seconds = time.monotonic() - start
    print(f"{len(pairs)} pairs, {wrong} wrong; largest difference {worst:.2g} (bound {BOUND:g}); {seconds:.0f} s")
    return wrong


def main() -> None:
    """Run the pairs; exit status 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all pairs, as nightly does")
    everything = cells()
    if parser.parse_args().all:
        pairs = [(source, target) for source in everything for target in everything]
    else:
        pairs = [(Cell(*pair[:2]), Cell(*pair[2:])) for pair in SHORT]
    sys.exit(1 if cross(pairs) else 0)


if __name__ == "__main__":
    main()
