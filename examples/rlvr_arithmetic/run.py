"""Unpack the model, and start the training script on as many ranks as are asked for.

``python run.py [--ranks N] [--least-gain POINTS] [arguments of train.py]``
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from setup_model import unpack

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--ranks", type=int, help="number of processes; default: 2, or 1 for the strategy fake")
    parser.add_argument("--model", type=Path, default=Path("runs/SmolLM2-135M-Instruct"))
    parser.add_argument("--least-gain", type=float, help="fail unless held-out exact match rose by this many points")
    args, others = parser.parse_known_args()
    unpack(args.model)
    alone = "fake" in _values(others, "--strategy")
    ranks = args.ranks or (1 if alone else 2)
    script = [str(HERE / "train.py"), "--pretrain", str(args.model), *others]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    status = wait_for([sys.executable, *launcher, *script], {"OMP_NUM_THREADS": threads, **os.environ})
    if status or args.least_gain is None:
        return status
    points = gain(Path(_values(["--output=runs/rlvr_arithmetic", *others], "--output")[-1]) / "metrics.jsonl")
    print(f"held-out exact match rose by {points:.1f} points; required: {args.least_gain:g}")
    return int(points < args.least_gain)


def wait_for(command: list[str], environment: dict[str, str]) -> int:
    """Return the exit status of ``command``. Ctrl-C reaches the command too, so wait until it ends."""
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def gain(metrics: Path) -> float:
    """Return by how many points held-out exact match rose from the first to the last measurement."""
    rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    measured = [row["exact_match"] for row in rows if row.get("exact_match") is not None]
    return 100 * float(measured[-1] - measured[0])


def _values(arguments: list[str], option: str) -> list[str]:
    """Return the values of ``option``, given as ``--option value`` or ``--option=value``."""
    pairs = itertools.pairwise([*arguments, ""])
    return [
        argument.partition("=")[2] or following
        for argument, following in pairs
        if argument == option or argument.startswith(option + "=")
    ]


if __name__ == "__main__":
    sys.exit(main())
