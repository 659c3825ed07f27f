"""Unpack the model, and start the training script on as many ranks as are asked for.

``python run.py [--ranks N] [--least-gain POINTS] [arguments of train.py]``
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

from plots import logged, measured
from setup_model import unpack

from lightrft.config import ConfigError
from lightrft.config.files import read_file

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--ranks", type=int, help="number of processes; default: 2, or 1 for the strategy fake")
    parser.add_argument("--model", type=Path, default=Path("runs/SmolLM2-135M-Instruct"))
    parser.add_argument("--least-gain", type=float, help="fail unless held-out exact match rose by this many points")
    args, others = parser.parse_known_args()
    try:
        alone = _setting(others, "strategy", "fsdp") == "fake"
        log_dir = Path(_setting(others, "log_dir", "runs/rlvr_arithmetic"))
    except ConfigError as error:
        parser.error(str(error))
    unpack(args.model)
    ranks = args.ranks or (1 if alone else 2)
    script = [str(HERE / "train.py"), "--pretrain", str(args.model), *others]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    threading = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin stall on busy cores
    status = wait_for([sys.executable, *launcher, *script], {**threading, **os.environ})
    if status or args.least_gain is None:
        return status
    points = gain(log_dir)
    print(f"held-out exact match rose by {points:.1f} points; required: {args.least_gain:g}")
    return int(points < args.least_gain)


def wait_for(command: list[str], environment: dict[str, str]) -> int:
    """Return the exit status of ``command``. Ctrl-C reaches the command too, so wait until it ends; SIGTERM is passed on."""
    process = subprocess.Popen(command, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def gain(folder: Path) -> float:
    """Return by how many points held-out exact match rose from the first to the last measurement."""
    values = measured(logged(folder), "exact_match")
    return 100 * (values[-1] - values[0])


def _setting(arguments: list[str], name: str, default: str) -> str:
    """Return a setting as train.py reads it: the default, then the files, then the command line."""
    files = [read_file("--config", file) for file in _values(arguments, "--config")]
    given = [str(settings[name]) for settings in files if name in settings]
    return [default, *given, *_values(arguments, f"--{name}", f"--{name.replace('_', '-')}")][-1]


def _values(arguments: list[str], *options: str) -> list[str]:
    """Return the values of an option, given as ``--option value`` or ``--option=value``."""
    pairs = itertools.pairwise([*arguments, ""])
    return [
        argument.partition("=")[2] or following
        for argument, following in pairs
        if argument.partition("=")[0] in options
    ]


if __name__ == "__main__":
    sys.exit(main())
