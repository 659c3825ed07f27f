"""Kill ranks while they save, at random instants, and see that the store still loads its newest committed checkpoint.

`python faults/kills.py --count N [--seed S]`. Each run has a store of its own with one committed checkpoint. One
rank, or all, get SIGKILL at an instant within the time that a save takes: before, while and after it is written,
committed and rotated; every second run saves in the background. Then FakeStrategy loads without a tag: it must get
the weights of the one checkpoint or of the other, bit for bit, and the newer one if its tag is there; the next save
must leave nothing half-written behind.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lightrft.strategy import get_fake_strategy

WIDTH = 192
PATIENCE = 120.0


def model(step: int) -> torch.nn.Module:
    """A model whose weights say of which step it is."""
    made = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def victim(folder: Path, asynchronous: bool) -> None:
    """One rank: save step 1, say so, wait for the word, save step 2, say so, and again."""
    from lightrft.conformance.saboteurs.plain import PlainStrategy

    strategy = PlainStrategy(bf16=False, device="cpu", timeout=60.0, train_batch_size=2, async_ckpt=asynchronous)
    trained = model(1)
    optimizer = strategy.create_optimizer(trained, lr=1e-3)
    strategy.prepare((trained, optimizer, None))
    for step in (1, 2, 3, 4):
        with torch.no_grad():
            for parameter, values in zip(trained.parameters(), model(step).parameters(), strict=True):
                parameter.copy_(values)
        if step == 2:
            print("ready", flush=True)
            sys.stdin.readline()
        strategy.save_ckpt(trained, folder, tag=f"step{step}", max_num=2)
        if step == 1:
            strategy._checkpoints.finish()
    strategy.close()
    print("done", flush=True)


class Run:
    """Ranks that save, and are killed."""

    def __init__(self, folder: Path, ranks: int, asynchronous: bool) -> None:
        port = str(20000 + random.randrange(20000))
        self.ranks = [self._start(folder, rank, ranks, port, asynchronous) for rank in range(ranks)]

    def _start(self, folder: Path, rank: int, ranks: int, port: str, asynchronous: bool) -> "subprocess.Popen[str]":
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(it) for name, it in place.items()}, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--victim", str(folder), *(["--asynchronous"] if asynchronous else [])]
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def begin(self) -> bool:
        """Wait until all have saved the first, and let them go on."""
        ready = all(it.stdout is not None and "ready" in it.stdout.readline() for it in self.ranks)
        for it in self.ranks:
            assert it.stdin is not None
            it.stdin.write("go\n")
            it.stdin.flush()
        return ready

    def kill(self, chosen: list[int]) -> None:
        """SIGKILL these, and give the others a moment to notice."""
        for rank in chosen:
            self.ranks[rank].send_signal(signal.SIGKILL)
        for it in self.ranks:
            try:
                it.wait(10)
            except subprocess.TimeoutExpired:
                it.kill()
                it.wait()

    def close(self) -> None:
        """Nothing of it is left."""
        for it in self.ranks:
            it.kill()
            it.wait()
            for pipe in (it.stdin, it.stdout):
                if pipe is not None:
                    pipe.close()


def examine(folder: Path) -> str:
    """Load the newest, compare, save once more; which step was there. Raises where a promise was broken."""
    with get_fake_strategy(bf16=False, train_batch_size=2) as strategy:
        found = model(0)
        path, _ = strategy.load_ckpt(found, folder, load_module_only=True)
        visible = {it.name for it in folder.iterdir() if not it.name.startswith(".") and it.is_dir()}
        step = int(path.name.removeprefix("step"))
        newest = max(int(name.removeprefix("step")) for name in visible)
        assert step == newest, f"loaded step {step}, and step {newest} is there"
        for parameter, wanted in zip(found.parameters(), model(step).parameters(), strict=True):
            assert torch.equal(parameter, wanted), f"step {step} is not what was saved"
        strategy.save_ckpt(found, folder, tag="after", max_num=9)
        left = [it.name for it in folder.iterdir() if it.name.startswith(".")]
        assert not left, f"left behind: {left}"
        return path.name


def one(number: int, draw: random.Random, ranks: int, span: float) -> tuple[str, float]:
    """One kill."""
    folder = Path(tempfile.mkdtemp(prefix="lightrft-kill-"))
    run = Run(folder, ranks, asynchronous=number % 2 == 1)
    try:
        assert run.begin(), "a rank did not come up"
        begun = time.monotonic()
        instant = draw.uniform(0, span)
        time.sleep(instant)
        chosen = list(range(ranks)) if draw.random() < 0.5 else [draw.randrange(ranks)]
        run.kill(chosen)
        return examine(folder), time.monotonic() - begun
    finally:
        run.close()
        shutil.rmtree(folder, ignore_errors=True)


def measured(ranks: int) -> float:
    """Seconds that three saves take, undisturbed: the span of the instants."""
    folder = Path(tempfile.mkdtemp(prefix="lightrft-kill-"))
    run = Run(folder, ranks, asynchronous=False)
    try:
        assert run.begin(), "a rank did not come up"
        begun = time.monotonic()
        for it in run.ranks:
            assert it.stdout is not None
            assert "done" in it.stdout.readline()
        return time.monotonic() - begun
    finally:
        run.close()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Kill, count, and end with status 1 where a store was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victim", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--asynchronous", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--all", action="store_true", help="as many as a night has room for: 200")
    asked = parser.parse_args()
    count = 200 if asked.all else asked.count
    if asked.victim is not None:
        victim(asked.victim, asked.asynchronous)
        return
    draw, found, lost = random.Random(asked.seed), Counter[str](), []
    span = 1.2 * measured(ranks=2)
    for number in range(count):
        try:
            found[one(number, draw, 2, span)[0]] += 1
        except Exception as error:  # noqa: BLE001 - counted
            lost.append(f"run {number}: {type(error).__name__}: {error}")
            print("LOST", lost[-1], flush=True)
    report: dict[str, Any] = {
        "kills": count,
        "span": round(span, 3),
        "newest": dict(sorted(found.items())),
        "lost": len(lost),
    }
    print(json.dumps(report))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
