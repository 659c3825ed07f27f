"""Unpack the model, and start the training script on as many ranks as are asked for.

``python run.py [--ranks N] [arguments of train.py]``
"""

import argparse
import itertools
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
    own, others = parser.parse_known_args()
    unpack(own.model)
    alone = "fake" in _values(others, "--strategy")
    ranks = own.ranks or (1 if alone else 2)
    script = [str(HERE / "train.py"), "--pretrain", str(own.model), *others]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    try:
        return subprocess.call([sys.executable, *launcher, *script], env={"OMP_NUM_THREADS": threads, **os.environ})
    except KeyboardInterrupt:
        return 130


def _values(arguments: list[str], option: str) -> list[str]:
    """What is given for ``option``, as ``--option value`` or ``--option=value``."""
    pairs = itertools.pairwise([*arguments, ""])
    return [it.partition("=")[2] or following for it, following in pairs if it == option or it.startswith(option + "=")]


if __name__ == "__main__":
    sys.exit(main())
