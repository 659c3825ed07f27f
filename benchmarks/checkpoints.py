"""Saving and loading against plain files of the same bytes: SmolLM2-135M's shapes with AdamW's state, fp32, one process.

Ratios within one run, each the best of several rounds: what a disk does varies more than what is measured. The
targets: save and load at least 0.6 of plain, a save in the background blocks for at most 0.25 of one that waits.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightrft.strategy import FakeStrategy, get_fake_strategy

TARGETS = {"save": (0.6, "at least"), "load": (0.6, "at least"), "blocking": (0.25, "at most")}


class Model(nn.Module):
    """Linear maps of the sizes of SmolLM2-135M's: 30 layers, width 576, 49152 tokens."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(49152, 576)
        sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
        self.layers = nn.ModuleList(nn.Linear(*size, bias=False) for _ in range(layers) for size in sizes)


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def prepared(strategy: FakeStrategy, layers: int) -> nn.Module:
    """The model with the state of one update."""
    model = Model(layers)
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    strategy.prepare((model, optimizer, None))
    loss = sum((parameter.sum() for parameter in model.parameters()), start=torch.zeros(()))
    strategy.backward(loss, model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return model


def write(path: Path, data: memoryview) -> None:
    """The plain way: one write, and fsync."""
    with path.open("wb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


def measure(folder: Path, layers: int, rounds: int) -> dict[str, float]:
    """The times, in seconds, and the size."""
    found: dict[str, list[float]] = {"write": [], "save": [], "read": [], "load": [], "blocked": []}
    with (
        get_fake_strategy(bf16=False, train_batch_size=1) as now,
        get_fake_strategy(bf16=False, train_batch_size=1, async_ckpt=True) as later,
    ):
        model, other = prepared(now, layers), prepared(later, layers)
        size = sum(it.stat().st_size for it in now.save_ckpt(model, folder / "now", tag="t").iterdir())
        data = memoryview(torch.zeros(size, dtype=torch.uint8).numpy())
        for _ in range(rounds):
            found["write"].append(seconds(lambda: write(folder / "plain", data)))
            found["save"].append(seconds(lambda: now.save_ckpt(model, folder / "now", tag="t")))
            found["read"].append(seconds((folder / "plain").read_bytes))
            found["load"].append(seconds(lambda: now.load_ckpt(model, folder / "now")))
            found["blocked"].append(seconds(lambda: later.save_ckpt(other, folder / "later", tag="t")))
            later._checkpoints.finish()
    return {"GB": size / 1e9, **{name: min(times) for name, times in found.items()}}


def main() -> None:
    """Measure, print, and write the numbers down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default a temporary one")
    parser.add_argument("--output", type=Path, help="a JSON file")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lightrft-bench-", dir=asked.folder))
    try:
        times = measure(folder, asked.layers, asked.rounds)
    finally:
        shutil.rmtree(folder)
    ratios = {
        "save": times["write"] / times["save"],
        "load": times["read"] / times["load"],
        "blocking": times["blocked"] / times["save"],
    }
    for name, value in times.items():
        print(f"{name:10} {value:8.3f}{'' if name == 'GB' else ' s'}")
    for name, value in ratios.items():
        target, word = TARGETS[name]
        print(f"{name:10} {value:8.2f}   wanted: {word} {target}")
    if asked.output is not None:
        asked.output.write_text(json.dumps({"times": times, "ratios": ratios}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
