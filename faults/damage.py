"""Damage single files of a checkpoint: loading must raise before it changes any state.

`python faults/damage.py --count N [--seed S]`: bit flips, truncated files, missing files, files swapped between two
checkpoints. Then a full disk (a small tmpfs, if this process may mount one), and pickles that run code when loaded.
"""

import argparse
import contextlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightrft.config import CheckpointError, CheckpointNotFoundError
from lightrft.strategy import FakeStrategy, get_fake_strategy

Model = torch.nn.Module


def trained(strategy: FakeStrategy, seed: int) -> tuple[Model, torch.optim.Optimizer]:
    """A model and its optimizer after one update."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 4))
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    strategy.prepare((model, optimizer, None))
    strategy.backward(model(torch.randn(4, 16)).pow(2).mean(), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return model, optimizer


def state(model: Model, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All state that a load may change, as bytes."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.state_dict().values(), *moments, torch.get_rng_state()]
    return [random.getstate(), *(tensor.detach().clone().numpy().tobytes() for tensor in tensors)]


def flip(folder: Path, other: Path, draw: random.Random) -> Path:
    path = draw.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return path


def truncate(folder: Path, other: Path, draw: random.Random) -> Path:
    path = draw.choice(sorted(folder.iterdir()))
    os.truncate(path, draw.randrange(path.stat().st_size))
    return path


def remove(folder: Path, other: Path, draw: random.Random) -> Path:
    path = draw.choice(sorted(folder.iterdir()))
    path.unlink()
    return path


def swap(folder: Path, other: Path, draw: random.Random) -> Path:
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes((other / path.name).read_bytes())
    return path


FAULTS: list[Callable[[Path, Path, random.Random], Path]] = [flip, flip, flip, truncate, remove, swap]


def damage(count: int, draw: random.Random) -> tuple[Counter[str], list[str]]:
    """Damage ``count`` checkpoints. Returns the number of faults detected, by type, and descriptions of errors."""
    detected: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        store = Path(folder)
        model, optimizer = trained(strategy, 1)
        for tag in ("one", "two"):
            strategy.save_ckpt(model, store / "intact", tag=tag, client_state={"tag": tag})
            strategy.backward(model(torch.randn(4, 16)).pow(2).mean(), model, optimizer)
            strategy.optimizer_step(optimizer, model)
        for number in range(count):
            shutil.copytree(store / "intact", store / "damaged")
            fault = draw.choice(FAULTS)
            path = fault(store / "damaged" / "two", store / "damaged" / "one", draw)
            before = state(model, optimizer)
            try:
                strategy.load_ckpt(model, store / "damaged", tag="two")
                wrong.append(f"{number}: {fault.__name__} of {path.name} was not detected")
            except (CheckpointError, CheckpointNotFoundError) as error:
                detected[fault.__name__] += 1
                if "damaged" not in str(error) or ("rank-" in path.name) > ("rank-" in str(error)):
                    wrong.append(f"{number}: {fault.__name__} of {path.name}: the message names another file: {error}")
            if state(model, optimizer) != before:
                wrong.append(f"{number}: {fault.__name__} of {path.name}: state changed")
            shutil.rmtree(store / "damaged")
    return detected, wrong


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def pickles() -> list[str]:
    """Replace each file by a pickle, then add pickles next to them, and load. Returns descriptions of errors."""
    with tempfile.TemporaryDirectory() as folder, get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, _ = trained(strategy, 1)
        canary = Path(folder) / "unpickled"
        names = [
            "manifest.json",
            "rank-00000-of-00001.safetensors",
            "token",
            ".metadata",
            "client_state.pt",
            "../latest",
        ]
        for name in names:
            strategy.save_ckpt(model, Path(folder) / "s", tag="t")
            (Path(folder) / "s" / "t" / name).write_bytes(pickle.dumps(Trap(canary)))
            with contextlib.suppress(CheckpointError, CheckpointNotFoundError):
                strategy.load_ckpt(model, Path(folder) / "s")
            shutil.rmtree(Path(folder) / "s")
        return ["loading ran a pickle"] if canary.exists() else []


def full_disk() -> list[str] | None:
    """Save to a full disk. Returns descriptions of errors, or None if no tmpfs can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
        )
        if mount.returncode:
            return None
        try:
            return _fill(Path(folder))
        finally:
            subprocess.run(["umount", folder], check=True)


def _fill(store: Path) -> list[str]:
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, _ = trained(strategy, 1)
        committed = []
        for tag in map(str, range(20)):
            try:
                strategy.save_ckpt(model, store, tag=tag, max_num=99)
                committed.append(tag)
            except CheckpointError as error:
                if "No space left" not in str(error):
                    return [f"expected 'No space left' in the message, got: {error}"]
                path, _ = strategy.load_ckpt(model, store)
                left = [file.name for file in store.iterdir() if file.name.startswith(".")]
                good = path.name == committed[-1] and not left
                return [] if good else [f"loaded {path.name} of {committed}, left {left}"]
        return ["the disk did not fill up"]


def main() -> None:
    """Run all; exit status 1 on any error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="500 files, as nightly does")
    arguments = parser.parse_args()
    count = 500 if arguments.all else arguments.count
    detected, wrong = damage(count, random.Random(arguments.seed))
    wrong += pickles()
    disk = full_disk()
    wrong += disk or []
    report = {"faults": count, "detected": dict(detected), "full disk": "not tried" if disk is None else "tried"}
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(json.dumps({**report, "pickles": "tried", "wrong": len(wrong)}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
