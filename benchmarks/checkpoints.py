"""Saving and loading, compared with plain files of the same size: SmolLM2-135M's shape and AdamW's state, fp32, one process.

Reports ratios of medians. The rounds alternate, so that other load on the machine affects all measurements alike. A plain
read is into allocated memory, as a model's is. Exit status 1 if a target is missed.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import seconds_of, smollm2

from lightrft.strategy import FakeStrategy, get_fake_strategy

CHUNK = 16 * 2**20
"""Bytes of the buffer of a save, unless the largest tensor needs more."""


@dataclass(frozen=True)
class Ratio:
    """A measured ratio and its target."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Measurements:
    """Seconds and additional bytes of memory of each action, by round."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.extra: dict[str, list[float]] = {}

    def take(self, name: str, action: Callable[[], object]) -> None:
        """Measure one call of ``action``."""
        with suppress(OSError):  # not everywhere
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory("VmRSS")
        self.seconds.setdefault(name, []).append(seconds_of(action, self.device))
        self.extra.setdefault(name, []).append(memory("VmHWM") - before)

    def ratios(self, size: int, largest: int) -> list[Ratio]:
        """The ratios, for checkpoints of ``size`` bytes whose largest tensor has ``largest`` bytes."""
        time_of = {name: median(times) for name, times in self.seconds.items()}
        most = {name: max(extra) for name, extra in self.extra.items()}
        bound = 2 * max(CHUNK, largest) / size
        return [
            Ratio("save / plain write", time_of["write"] / time_of["save"], 0.6, at_least=True),
            Ratio("load / plain read", time_of["read"] / time_of["load"], 0.6, at_least=True),
            Ratio("load / plain read, cold cache", time_of["cold read"] / time_of["cold load"], 0.6, at_least=True),
            Ratio("blocked / save", time_of["blocked"] / time_of["save"], 0.25),
            Ratio("memory of save", most["save"] / size, bound),
            Ratio("memory of load", most["load"] / size, bound),
            Ratio("memory of a background save", most["blocked"] / size, 1 + bound),
        ]


def memory(field: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` is the current size, ``VmHWM`` the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def prepared(strategy: FakeStrategy) -> Any:
    """The model and its optimizer state after one update."""
    model: Any = smollm2(torch.float32)
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
    tokens = torch.arange(8, device=strategy.device)[None]
    strategy.backward(model(tokens, labels=tokens).loss, model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return model


def write(path: Path, data: memoryview) -> None:
    """Write a new file with fsync and move it to ``path``, as a save does."""
    temporary_path = path.with_suffix(".writing")
    with temporary_path.open("xb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    temporary_path.replace(path)


def read(path: Path, target: memoryview) -> None:
    """Read ``path`` into ``target``."""
    with path.open("rb", buffering=0) as file:
        while target:
            target = target[file.readinto(target) :]


def forget(folder: Path) -> None:
    """Drop the files in ``folder`` from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, rounds: int, device: str) -> tuple[Measurements, int, int]:
    """Returns the measurements, the bytes of a checkpoint and the bytes of its largest tensor."""
    with (
        get_fake_strategy(bf16=False, train_batch_size=1, device=device) as blocking,
        get_fake_strategy(bf16=False, train_batch_size=1, device=device, async_ckpt=True) as background,
    ):
        measurements = Measurements(blocking.device)
        model, other = prepared(blocking), prepared(background)
        checkpoint = blocking.save_ckpt(model, folder / "blocking", tag="t")
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        data = memoryview(torch.randint(256, (size,), dtype=torch.uint8).numpy())
        background.save_ckpt(other, folder / "background", tag="t")  # the first save allocates memory for copies
        for _ in range(rounds):
            background._checkpoint_saver.finish()
            measurements.take("blocked", lambda: background.save_ckpt(other, folder / "background", tag="t"))
            background._checkpoint_saver.finish()
            measurements.take("write", lambda: write(folder / "plain", data))
            measurements.take("save", lambda: blocking.save_ckpt(model, folder / "blocking", tag="t"))
            measurements.take("read", lambda: read(folder / "plain", data))
            measurements.take("load", lambda: blocking.load_ckpt(model, folder / "blocking"))
            forget(folder)
            measurements.take("cold read", lambda: read(folder / "plain", data))
            measurements.take("cold load", lambda: blocking.load_ckpt(model, folder / "blocking"))
    return measurements, size, max(parameter.nbytes for parameter in model.parameters())


def main() -> int:
    """Measure, print and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: the temporary folder")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lightrft-bench-", dir=arguments.folder))
    try:
        measurements, size, largest = measure(folder, arguments.rounds, arguments.device)
    finally:
        shutil.rmtree(folder)
    for name, times in measurements.seconds.items():
        print(f"{name:10} {median(times):8.3f} s ({min(times):.3f} to {max(times):.3f}) for {size / 1e9:.3f} GB")
    ratios = measurements.ratios(size, largest)
    for ratio in ratios:
        print(f"{ratio.name:36} {ratio.value:8.2f}   target: {'>=' if ratio.at_least else '<='} {ratio.bound:.2f}")
    if arguments.output is not None:
        contents = {"seconds": measurements.seconds, "extra": measurements.extra, "ratios": list(map(asdict, ratios))}
        arguments.output.write_text(json.dumps(contents, indent=2), encoding="utf-8")
    return int(not all(ratio.met for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
