"""Single faults in the files of a checkpoint: each is found before any state changes, or changes nothing.

`python faults/damage.py --count N [--seed S]`: bit flips, truncations, files that are gone, files swapped between two
checkpoints. Then a full disk (a small tmpfs, where this process may mount one) and pickles that act when read.
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
    """A model with an update behind it."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 4))
    optimizer = strategy.create_optimizer(model, lr=1e-2)
    strategy.prepare((model, optimizer, None))
    strategy.backward(model(torch.randn(4, 16)).pow(2).mean(), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return model, optimizer


def state(model: Model, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a load may change, as bytes."""
    moments = [value for it in optimizer.state.values() for value in it.values()]
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


def spoil(count: int, draw: random.Random) -> tuple[Counter[str], list[str]]:
    """Faults found, by kind, and what was wrong."""
    found: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as place, get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        store = Path(place)
        model, optimizer = trained(strategy, 1)
        for tag in ("one", "two"):
            strategy.save_ckpt(model, store / "whole", tag=tag, client_state={"tag": tag})
            strategy.backward(model(torch.randn(4, 16)).pow(2).mean(), model, optimizer)
            strategy.optimizer_step(optimizer, model)
        for number in range(count):
            shutil.copytree(store / "whole", store / "spoiled")
            fault = draw.choice(FAULTS)
            path = fault(store / "spoiled" / "two", store / "spoiled" / "one", draw)
            before = state(model, optimizer)
            try:
                strategy.load_ckpt(model, store / "spoiled", tag="two")
                wrong.append(f"{number}: {fault.__name__} of {path.name} was not found")
            except (CheckpointError, CheckpointNotFoundError) as error:
                found[fault.__name__] += 1
                if "spoiled" not in str(error) or ("rank-" in path.name) > ("rank-" in str(error)):
                    wrong.append(f"{number}: {fault.__name__} of {path.name}: the message names another file: {error}")
            if state(model, optimizer) != before:
                wrong.append(f"{number}: {fault.__name__} of {path.name}: state changed")
            shutil.rmtree(store / "spoiled")
    return found, wrong


class Trap:
    """Unpickled, makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def hostile() -> list[str]:
    """Whether reading ran anything, with pickles in the place of each file and beside them."""
    with tempfile.TemporaryDirectory() as place, get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, _ = trained(strategy, 1)
        canary = Path(place) / "sprung"
        names = [
            "manifest.json",
            "rank-00000-of-00001.safetensors",
            "token",
            ".metadata",
            "client_state.pt",
            "../latest",
        ]
        for name in names:
            strategy.save_ckpt(model, Path(place) / "s", tag="t")
            (Path(place) / "s" / "t" / name).write_bytes(pickle.dumps(Trap(canary)))
            with contextlib.suppress(CheckpointError, CheckpointNotFoundError):
                strategy.load_ckpt(model, Path(place) / "s")
            shutil.rmtree(Path(place) / "s")
        return ["a pickle in the checkpoint was run"] if canary.exists() else []


def full_disk() -> list[str] | None:
    """What is lost on a disk that is full; None where no small file system can be mounted."""
    with tempfile.TemporaryDirectory() as place:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True, check=False
        )
        if mount.returncode:
            return None
        try:
            return _fill(Path(place))
        finally:
            subprocess.run(["umount", place], check=True)


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
                    return [f"the message does not say that the disk is full: {error}"]
                path, _ = strategy.load_ckpt(model, store)
                left = [it.name for it in store.iterdir() if it.name.startswith(".")]
                return (
                    []
                    if path.name == committed[-1] and not left
                    else [f"loaded {path.name} of {committed}, left {left}"]
                )
        return ["the disk was never full"]


def main() -> None:
    """Count, and end with status 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="faults in files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="as many as a night has room for: 500")
    asked = parser.parse_args()
    count = 500 if asked.all else asked.count
    found, wrong = spoil(count, random.Random(asked.seed))
    wrong += hostile()
    disk = full_disk()
    wrong += disk or []
    report = {"faults": count, "found": dict(found), "full disk": "not tried" if disk is None else "tried"}
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(json.dumps({**report, "hostile": "tried", "wrong": len(wrong)}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
