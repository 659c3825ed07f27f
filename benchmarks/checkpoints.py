"""Saving and loading against plain files of the same bytes: SmolLM2-135M with AdamW's state, fp32, one process.

Ratios of medians; the rounds of all that is compared take turns, so that what else the machine does meets all of it.
A plain read is into memory that is there already, as a model's is. Ends with 1 where a target is missed.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightrft.strategy import FakeStrategy, get_fake_strategy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/rlvr_arithmetic"))
from setup_model import unpack

MODEL = Path("runs/SmolLM2-135M-Instruct")
CHUNK = 16 * 2**20
"""Bytes that a save may hold beside the state; the largest tensor is larger still."""


@dataclass(frozen=True)
class Ratio:
    """What was measured, and its target."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Measurements:
    """Seconds, and bytes of memory beyond those held before, of every round of each action."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.extra: dict[str, list[float]] = {}

    def take(self, name: str, action: Callable[[], object]) -> None:
        """Do it once."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, begun = memory("VmRSS"), time.perf_counter()
        action()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begun)
        self.extra.setdefault(name, []).append(memory("VmHWM") - before)

    def ratios(self, size: int, largest: int) -> list[Ratio]:
        """What is asked for of them, for checkpoints of ``size`` bytes."""
        time_of = {name: median(times) for name, times in self.seconds.items()}
        most = {name: max(extra) for name, extra in self.extra.items()}
        bound = 2 * max(CHUNK, largest) / size
        return [
            Ratio("save / plain write", time_of["write"] / time_of["save"], 0.6, at_least=True),
            Ratio("load / plain read", time_of["read"] / time_of["load"], 0.6, at_least=True),
            Ratio("the same, from the disk", time_of["cold read"] / time_of["cold load"], 0.6, at_least=True),
            Ratio("blocked / save", time_of["blocked"] / time_of["save"], 0.25),
            Ratio("memory of save", most["save"] / size, bound),
            Ratio("memory of load", most["load"] / size, bound),
            Ratio("memory of a save in the background", most["blocked"] / size, 1 + bound),
        ]


def memory(what: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at the most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def prepared(strategy: FakeStrategy) -> Any:
    """The model with the state of one update."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
    tokens = torch.arange(8)[None]
    strategy.backward(model(tokens, labels=tokens).loss, model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return model


def write(path: Path, data: memoryview) -> None:
    """The plain way: one write, and fsync; a new file that takes the place of the old one, as a checkpoint does."""
    aside = path.with_suffix(".writing")
    with aside.open("xb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    aside.replace(path)


def read(path: Path, target: memoryview) -> None:
    """The plain way, too."""
    with path.open("rb", buffering=0) as file:
        while target:
            target = target[file.readinto(target) :]


def forget(folder: Path) -> None:
    """Let the system drop what it keeps in memory of the files below ``folder``."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, rounds: int) -> tuple[Measurements, int, int]:
    """The measurements, the bytes of a checkpoint, and those of the largest tensor in it."""
    found = Measurements()
    with (
        get_fake_strategy(bf16=False, train_batch_size=1) as now,
        get_fake_strategy(bf16=False, train_batch_size=1, async_ckpt=True) as later,
    ):
        model, other = prepared(now), prepared(later)
        size = sum(it.stat().st_size for it in now.save_ckpt(model, folder / "now", tag="t").iterdir())
        data = memoryview(torch.randint(256, (size,), dtype=torch.uint8).numpy())
        later.save_ckpt(other, folder / "later", tag="t")  # the first one makes the room for the copies
        for _ in range(rounds):
            later._checkpoints.finish()
            found.take("blocked", lambda: later.save_ckpt(other, folder / "later", tag="t"))
            later._checkpoints.finish()
            found.take("write", lambda: write(folder / "plain", data))
            found.take("save", lambda: now.save_ckpt(model, folder / "now", tag="t"))
            found.take("read", lambda: read(folder / "plain", data))
            found.take("load", lambda: now.load_ckpt(model, folder / "now"))
            forget(folder)
            found.take("cold read", lambda: read(folder / "plain", data))
            found.take("cold load", lambda: now.load_ckpt(model, folder / "now"))
    return found, size, max(it.nbytes for it in model.parameters())


def main() -> int:
    """Measure, print, and write the numbers down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; by default a temporary one")
    parser.add_argument("--output", type=Path, help="a JSON file")
    asked = parser.parse_args()
    unpack(MODEL)
    folder = Path(tempfile.mkdtemp(prefix="lightrft-bench-", dir=asked.folder))
    try:
        found, size, largest = measure(folder, asked.rounds)
    finally:
        shutil.rmtree(folder)
    for name, times in found.seconds.items():
        print(f"{name:10} {median(times):8.3f} s ({min(times):.3f} to {max(times):.3f}) for {size / 1e9:.3f} GB")
    ratios = found.ratios(size, largest)
    for it in ratios:
        print(f"{it.name:36} {it.value:8.2f}   wanted: at {'least' if it.at_least else 'most'} {it.bound:.2f}")
    if asked.output is not None:
        contents = {"seconds": found.seconds, "extra": found.extra, "ratios": [asdict(it) for it in ratios]}
        asked.output.write_text(json.dumps(contents, indent=2), encoding="utf-8")
    return int(not all(it.met for it in ratios))


if __name__ == "__main__":
    sys.exit(main())
