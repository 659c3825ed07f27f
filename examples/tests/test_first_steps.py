"""The script of the README: the same lines, on three strategies."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/first_steps/train.py"
SECONDS = 300
"""For one run; DeepSpeed may have operators to compile."""
WITH_BATCHES_ELSEWHERE = """
import runpy
import sys

import torch
from lightrft.strategy import FakeStrategy


class Elsewhere(torch.Tensor):
    \"""A tensor that is only good for moving it, as one on the host is for a model on a GPU.\"""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not torch.Tensor.to:
            raise RuntimeError(f"{function.__name__}: expected all tensors on the same device")
        return args[0].as_subclass(torch.Tensor)


FakeStrategy.setup_dataloader = lambda self, data, batch_size, **options: (
    batch.as_subclass(Elsewhere) for batch in data.split(batch_size)
)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str, ranks: int, launcher: Sequence[str] = ()) -> list[str]:
    """What the script prints, without the time of day."""
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, str(SCRIPT), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return re.findall(r"gradient norm \d\.\d{5}$", done.stdout, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def alone() -> list[str]:
    return run("--strategy=fake", ranks=1)


def test_five_updates_are_printed(alone):
    assert len(alone) == 5


def test_the_script_moves_batches_to_the_device(alone):
    assert run("--strategy=fake", ranks=1, launcher=["-c", WITH_BATCHES_ELSEWHERE]) == alone


@pytest.mark.parametrize("arguments", [["--strategy=fsdp"], ["--strategy=deepspeed", "--zero-stage=3"]])
def test_two_ranks_print_what_one_process_prints(alone, arguments):
    assert run(*arguments, ranks=2) == alone


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readme_shows_the_script(readme, alone):
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert f"```python\n{SCRIPT.read_text(encoding='utf-8')}```\n" in text
    assert alone[-1] in text
