"""Kill ranks while they save, at random times; the newest committed checkpoint must still load.

`python faults/kills.py --count N [--seed S]`. Each run starts with one committed checkpoint in a new store. One rank, or
all, get SIGKILL at a random time during the next saves: while they write, commit or rotate. Every second run saves in the
background. Then FakeStrategy loads without a tag: it must restore the newest visible checkpoint bit for bit, and the next
save must remove all partial files.
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
    """A model with weights that only ``step`` has."""
    built = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return built


def victim(folder: Path, environment: dict[str, str], asynchronous: bool, driver: Connection) -> None:
    """Run one rank until it ends or loses a peer."""
    os.environ |= environment
    torch.set_num_threads(1)
    with suppress(LightRFTError, EOFError):
        save_repeatedly(folder, asynchronous, driver)


def save_repeatedly(folder: Path, asynchronous: bool, driver: Connection) -> None:
    """Save step 1, report, wait for the driver, save steps 2 to 4, and report."""
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
            strategy._checkpoint_saver.finish()
    strategy.close()
    driver.send("done")


class Run:
    """Ranks that save and are killed."""

    def __init__(self, folder: Path, ranks: int, asynchronous: bool) -> None:
        port = str(20000 + random.randrange(20000))
        self.ranks: list[tuple[BaseProcess, Connection]] = []
        for rank in range(ranks):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            connection, remote = FORKS.Pipe()
            process = FORKS.Process(target=victim, args=(folder, environment, asynchronous, remote))
            process.start()
            remote.close()
            self.ranks.append((process, connection))

    def begin(self) -> None:
        """Wait for the first save of all ranks, and let them continue."""
        self.wait_for("ready")
        for _, connection in self.ranks:
            connection.send("go")

    def wait_for(self, word: str) -> None:
        """Wait until all ranks have sent ``word``."""
        for rank, (_, connection) in enumerate(self.ranks):
            assert connection.poll(PATIENCE), f"rank {rank} did not send {word!r} within {PATIENCE:g} s"
            assert connection.recv() == word

    def kill(self, chosen: list[int]) -> None:
        """Send SIGKILL to ranks ``chosen``, and give the others time to notice."""
        for rank in chosen:
            self.ranks[rank][0].kill()
        for process, _ in self.ranks:
            process.join(10)
        self.close()

    def close(self) -> None:
        """End all ranks."""
        for process, connection in self.ranks:
            process.kill()
            process.join()
            connection.close()


def examine(folder: Path) -> str:
    """Load the newest checkpoint, compare, and save again. Returns its tag; raises `AssertionError` if it is wrong."""
    with get_fake_strategy(bf16=False, train_batch_size=2) as strategy:
        loaded = model(0)
        path, _ = strategy.load_ckpt(loaded, folder, load_module_only=True)
        visible = {path.name for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir()}
        step = int(path.name.removeprefix("step"))
        newest = max(int(name.removeprefix("step")) for name in visible)
        assert step == newest, f"expected step {newest}, got {step}"
        for parameter, expected in zip(loaded.parameters(), model(step).parameters(), strict=True):
            assert torch.equal(parameter, expected), f"step {step} differs from the saved weights"
        strategy.save_ckpt(loaded, folder, tag="after", max_num=9)
        partial = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert not partial, f"partial files remain: {partial}"
        return path.name


@contextmanager
def running(ranks: int, asynchronous: bool) -> Iterator[tuple[Path, Run]]:
    """A store, and ranks that have saved to it once."""
    folder = Path(tempfile.mkdtemp(prefix="lightrft-kill-"))
    run = Run(folder, ranks, asynchronous)
    try:
        run.begin()
        yield folder, run
    finally:
        run.close()
        shutil.rmtree(folder, ignore_errors=True)


def kill_once(number: int, draw: random.Random, ranks: int, span: float) -> str:
    """Kill ranks once. Returns the tag that loads afterwards."""
    with running(ranks, asynchronous=number % 2 == 1) as (folder, run):
        time.sleep(draw.uniform(0, span))
        run.kill(list(range(ranks)) if draw.random() < 0.5 else [draw.randrange(ranks)])
        return examine(folder)


def seconds_of_saves(ranks: int) -> float:
    """Seconds that the three saves take without a kill."""
    with running(ranks, asynchronous=False) as (_, run):
        start = time.monotonic()
        run.wait_for("done")
        return time.monotonic() - start


def main() -> None:
    """Run all kills; exit status 1 if a store is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="number of kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="200 kills, as nightly does")
    arguments = parser.parse_args()
    count = 200 if arguments.all else arguments.count
    draw, loaded, lost = random.Random(arguments.seed), Counter[str](), []
    span = 1.2 * seconds_of_saves(ranks=2)
    for number in range(count):
        try:
            loaded[kill_once(number, draw, 2, span)] += 1
        except Exception as error:  # noqa: BLE001 - counted
            lost.append(f"run {number}: {type(error).__name__}: {error}")
            print("LOST", lost[-1], flush=True)
    report: dict[str, Any] = {
        "kills": count,
        "span": round(span, 3),
        "loaded": dict(sorted(loaded.items())),
        "lost": len(lost),
    }
    print(json.dumps(report))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
