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
    parser.add_argument("--ranks", type=int, help="processes; by default 2, and 1 for the strategy fake")
    parser.add_argument("--model", type=Path, default=Path("runs/SmolLM2-135M-Instruct"))
    parser.add_argument("--least-gain", type=float, help="fail unless held-out exact match rose by so many points")
    own, others = parser.parse_known_args()
    unpack(own.model)
    alone = "fake" in _values(others, "--strategy")
    ranks = own.ranks or (1 if alone else 2)
    script = [str(HERE / "train.py"), "--pretrain", str(own.model), *others]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    status = wait_for([sys.executable, *launcher, *script], {"OMP_NUM_THREADS": threads, **os.environ})
    if status or own.least_gain is None:
        return status
    found = gain(Path(_values(["--output=runs/rlvr_arithmetic", *others], "--output")[-1]) / "metrics.jsonl")
    print(f"held-out exact match rose by {found:.1f} points; asked for were {own.least_gain:g}")
    return int(found < own.least_gain)


def wait_for(command: list[str], environment: dict[str, str]) -> int:
    """The exit status of ``command``. An interrupt from the terminal reaches it as well, and it ends in its own time."""
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def gain(metrics: Path) -> float:
    """Points of held-out exact match between the first measurement and the last."""
    rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    measured = [row["exact_match"] for row in rows if row.get("exact_match") is not None]
    return 100 * float(measured[-1] - measured[0])


def _values(arguments: list[str], option: str) -> list[str]:
    """What is given for ``option``, as ``--option value`` or ``--option=value``."""
    pairs = itertools.pairwise([*arguments, ""])
    return [it.partition("=")[2] or following for it, following in pairs if it == option or it.startswith(option + "=")]


if __name__ == "__main__":
    sys.exit(main())
