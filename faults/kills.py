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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lightrft.config import LightRFTError
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import get_fake_strategy

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "lightrft.strategy", "lightrft.conformance.saboteurs.plain"])
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


def victim(folder: Path, place: dict[str, str], asynchronous: bool, driver: Connection) -> None:
    """One rank, until it ends, or another one did."""
    os.environ |= place
    torch.set_num_threads(1)
    with suppress(LightRFTError, EOFError):
        save_again_and_again(folder, asynchronous, driver)


def save_again_and_again(folder: Path, asynchronous: bool, driver: Connection) -> None:
    """Save step 1, say so, wait for the word, save step 2, 3 and 4, and say so."""
    strategy = PlainStrategy(bf16=False, device="cpu", timeout=60.0, train_batch_size=2, async_ckpt=asynchronous)
    trained = model(1)
    optimizer = strategy.create_optimizer(trained, lr=1e-3)
    strategy.prepare((trained, optimizer, None))
    for step in (1, 2, 3, 4):
        with torch.no_grad():
            for parameter, values in zip(trained.parameters(), model(step).parameters(), strict=True):
                parameter.copy_(values)
        if step == 2:
            driver.send("ready")
            driver.recv()
        strategy.save_ckpt(trained, folder, tag=f"step{step}", max_num=2)
        if step == 1:
            strategy._checkpoints.finish()
    strategy.close()
    driver.send("done")


class Run:
    """Ranks that save, and are killed."""

    def __init__(self, folder: Path, ranks: int, asynchronous: bool) -> None:
        port = str(20000 + random.randrange(20000))
        self.ranks: list[tuple[BaseProcess, Connection]] = []
        for rank in range(ranks):
            place = {
                "RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            mine, its = FORKS.Pipe()
            arguments = (folder, {name: str(it) for name, it in place.items()}, asynchronous, its)
            process = FORKS.Process(target=victim, args=arguments)
            process.start()
            its.close()
            self.ranks.append((process, mine))

    def begin(self) -> None:
        """Wait until all have saved the first, and let them go on."""
        self.hear("ready")
        for _, connection in self.ranks:
            connection.send("go")

    def hear(self, word: str) -> None:
        """Wait until all have said ``word``."""
        for rank, (_, connection) in enumerate(self.ranks):
            assert connection.poll(PATIENCE), f"rank {rank} did not say {word!r}"
            assert connection.recv() == word

    def kill(self, chosen: list[int]) -> None:
        """SIGKILL these, and give the others a moment to notice."""
        for rank in chosen:
            self.ranks[rank][0].kill()
        for process, _ in self.ranks:
            process.join(10)
        self.close()

    def close(self) -> None:
        """Nothing of it is left."""
        for process, connection in self.ranks:
            process.kill()
            process.join()
            connection.close()


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


@contextmanager
def running(ranks: int, asynchronous: bool) -> Iterator[tuple[Path, Run]]:
    """Ranks that have saved once, and a store."""
    folder = Path(tempfile.mkdtemp(prefix="lightrft-kill-"))
    run = Run(folder, ranks, asynchronous)
    try:
        run.begin()
        yield folder, run
    finally:
        run.close()
        shutil.rmtree(folder, ignore_errors=True)


def one(number: int, draw: random.Random, ranks: int, span: float) -> str:
    """One kill; the step that was loaded."""
    with running(ranks, asynchronous=number % 2 == 1) as (folder, run):
        time.sleep(draw.uniform(0, span))
        run.kill(list(range(ranks)) if draw.random() < 0.5 else [draw.randrange(ranks)])
        return examine(folder)


def measured(ranks: int) -> float:
    """Seconds that three saves take, undisturbed: the span of the instants."""
    with running(ranks, asynchronous=False) as (_, run):
        begun = time.monotonic()
        run.hear("done")
        return time.monotonic() - begun


def main() -> None:
    """Kill, count, and end with status 1 where a store was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="as many as a night has room for: 200")
    asked = parser.parse_args()
    count = 200 if asked.all else asked.count
    draw, found, lost = random.Random(asked.seed), Counter[str](), []
    span = 1.2 * measured(ranks=2)
    for number in range(count):
        try:
            found[one(number, draw, 2, span)] += 1
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
