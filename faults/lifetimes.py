"""Start, train, save, load, close and exit, many times; every rank must exit with 0 and leave no thread of its strategy.

`python faults/lifetimes.py --count N [--seed S]`. Lifetimes alternate between ZeRO-3 on 3 ranks and FSDP2 on 2. Each is one
process per rank, forked from this one, which has imported the libraries. It ends as a script does: the interpreter is finalized,
with models and strategy still among its globals. Options are drawn: save in the background, log to a file, load
in a second lifetime, do not close at all.

A rank that crashes leaves the Python stacks of its threads, the names of all threads after `close`, and a core file if the
system writes those; the directory is printed and kept.
"""

import argparse
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from lightrft.strategy import get_strategy

PATIENCE = 240.0
STRATEGIES: list[tuple[dict[str, Any], int]] = [
    ({"strategy": "deepspeed", "zero_stage": 3}, 3),
    ({"strategy": "fsdp"}, 2),
]
MODULES = (
    "torch._dynamo", "torch.distributed.nn.functional", "deepspeed", "lightrft.deepspeed", "lightrft.fsdp",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which imports torch._inductor, when DeepSpeed looks at an optimizer
)  # fmt: skip
"""What ranks import; several seconds for each, unless it is imported before they are forked."""
THREADS_OF_A_STRATEGY = ("gloo", "lightrft", "pt_gloo")
"""Names, or their beginnings, of threads that must be gone after `close`."""


@dataclass(frozen=True)
class Options:
    """What the ranks of a lifetime do."""

    settings: dict[str, Any]
    ranks: int
    asynchronous: bool
    """Save in the background."""
    trackers: bool
    loads: bool
    closes: bool
    """Call `close`; otherwise, leave the end of the process groups to the interpreter's exit."""


class Model(torch.nn.Sequential):
    """Layers that FSDP2 shards."""

    _no_split_modules = ["Linear"]


def draw(number: int, stream: random.Random) -> Options:
    """The options of one lifetime."""
    settings, ranks = STRATEGIES[number % len(STRATEGIES)]
    asynchronous, trackers = stream.random() < 0.5, stream.random() < 0.5
    return Options(settings, ranks, asynchronous, trackers, loads=stream.random() < 0.7, closes=stream.random() < 0.8)


def run_rank(options: Options, folder: Path, rank: int, port: int) -> NoReturn:
    """Run one rank in this process, a fork, and end it as the interpreter does."""
    status = 1
    try:
        os.chdir(folder)
        os.dup2(os.open(f"rank{rank}.stderr", os.O_CREAT | os.O_WRONLY), 2)
        faulthandler.enable()
        faulthandler.dump_traceback_later(PATIENCE - 20)
        variables = {"RANK": rank, "WORLD_SIZE": options.ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
        train(options, folder)
        threads = names_of_threads()
        Path(f"rank{rank}.threads").write_text("\n".join(threads) + "\n")
        left = [name for name in threads if name.startswith(THREADS_OF_A_STRATEGY)]
        if options.closes and left:
            raise AssertionError(f"threads after close: {left}")
        status = 0
    except BaseException:  # noqa: BLE001 - printed, and counted by its exit code
        sys.excepthook(*sys.exc_info())
    faulthandler.cancel_dump_traceback_later()
    ctypes.pythonapi.Py_Exit(status)
    os._exit(1)


def train(options: Options, folder: Path) -> None:
    """Load the checkpoint of an earlier part of this lifetime, train, save, and close."""
    scripts_globals = vars(sys.modules["__main__"])
    trackers: dict[str, Any] = {"log_dir": str(folder / "logs")} if options.trackers else {}
    common = {
        "bf16": False, "device": "cpu", "timeout": 60.0, "train_batch_size": options.ranks, "async_ckpt": options.asynchronous,
    }  # fmt: skip
    for part in range(2 if options.loads else 1):
        strategy = get_strategy({**common, **options.settings, **trackers})
        model: Any = Model(*(torch.nn.Linear(64, 64) for _ in range(4)))
        model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
        scripts_globals |= {
            "strategy": strategy,
            "model": model,
            "optimizer": optimizer,
        }  # as in a script, which keeps them
        if part:
            strategy.load_ckpt(model, folder / "checkpoints")
        for step in range(2):
            strategy.backward(model(torch.ones(1, 64)).square().mean(), model, optimizer)
            strategy.optimizer_step(optimizer, model)
            strategy.log({"update": step}, step)
        strategy.save_ckpt(model, folder / "checkpoints", tag=f"part{part}")
        if part == 0 and options.loads:
            strategy.close()
    if options.closes:
        strategy.close()


def names_of_threads() -> list[str]:
    """The names of all threads of this process, those of C++ libraries included."""
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


def run(options: Options, folder: Path) -> list[int]:
    """Run one lifetime; the exit code of each rank, negative if a signal ended it."""
    ranks, port = [], free_port()
    for rank in range(options.ranks):
        process = os.fork()
        if not process:
            run_rank(options, folder, rank, port)
        ranks.append(process)
    return [exit_code(process, deadline=time.monotonic() + PATIENCE) for process in ranks]


def free_port() -> int:
    """Return a TCP port that the system has just chosen."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def exit_code(process: int, deadline: float) -> int:
    """Wait for a child process, and end it at the deadline."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    """Run all lifetimes; exit status 1 if a rank did not exit with 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6, help="number of lifetimes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="300 lifetimes, as nightly does")
    arguments = parser.parse_args()
    count = 300 if arguments.all else arguments.count
    import_all()
    stream, codes, wrong = random.Random(arguments.seed), Counter[str](), 0
    for number in range(count):
        options, folder = draw(number, stream), Path(tempfile.mkdtemp(prefix="lightrft-life-"))
        ended = run(options, folder)
        codes.update(map(str, ended))
        if any(ended):
            wrong += 1
            print(f"lifetime {number}: exit codes {ended}, {asdict(options)}, see {folder}", flush=True)
            for path in sorted(folder.glob("rank*.*")):
                print(f"--- {path.name}\n{path.read_text(errors='replace')}", flush=True)
        else:
            shutil.rmtree(folder)
        if number % 10 == 9:
            print(f"{number + 1} lifetimes, exit codes {dict(codes)}", file=sys.stderr, flush=True)
    print(json.dumps({"lifetimes": count, "exit codes": dict(codes), "wrong": wrong}))
    sys.exit(1 if wrong else 0)


def import_all() -> None:
    """Import what the ranks use, once. The garbage collector ignores it from now on, so that the forks share its memory."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    for name in MODULES:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    main()
