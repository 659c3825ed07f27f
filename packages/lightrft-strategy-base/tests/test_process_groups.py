"""Threads of process groups end with the strategy that made the groups, at the latest before the interpreter ends."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit
from pathlib import Path

def show():
    names = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    print(sum("gloo" in name for name in names))

atexit.register(show)  # called after all handlers that are registered later

from lightrft.strategy import StrategyBase

class Plain(StrategyBase):
    name = "plain"

strategy = Plain(device="cpu", async_ckpt=True)
strategy.all_reduce(1.0)
show()
import torch.distributed.nn.functional  # as DeepSpeed does
"""


def shown(program: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert not done.stderr
    return [int(line) for line in done.stdout.split()]


FORKED = """
import os, sys
sys.stdout.flush()
strategy._end_process_groups = lambda: print(-1)
if not os.fork():
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)  # the end of the interpreter would wait for threads of gloo, which a fork does not copy
os.wait()
del strategy._end_process_groups
strategy.close()
"""


def test_a_child_that_ends_leaves_the_groups_to_its_parent() -> None:
    running, *closed = shown(PROGRAM + FORKED)
    assert running > 0
    assert closed == [0, 0]


@pytest.mark.parametrize("end", ["strategy.close()\nshow()", "", "raise SystemExit"])
def test_threads_of_a_process_group_end_before_the_interpreter(end: str) -> None:
    running, *closed = shown(PROGRAM + end)
    assert running > 0
    assert not any(closed)
