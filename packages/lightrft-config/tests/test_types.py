"""What type checkers and editors know of `StrategyConfig`."""

import inspect
import subprocess
import sys

import pytest

from lightrft.config import StrategyConfig

CALLS = """
from lightrft.config import StrategyConfig

StrategyConfig()
StrategyConfig(strategy="deepspeed", zero_stage=3, max_norm=None, adam_betas=(0.9, 0.95), extra_args={"mine": 1})
StrategyConfig(timeout=60, remote_rm_url=("a", "b"), use_tensorboard="runs", kl_estimator="k1")
config: StrategyConfig = StrategyConfig(seed=1).replace(seed=2)
seed: int = config.seed
betas: tuple[float, float] = config.adam_betas
StrategyConfig(train_batchsize=64)  # refused
StrategyConfig(seed="1")  # refused
StrategyConfig(timeout=None)  # refused
StrategyConfig(adam_betas=(0.9,))  # refused
StrategyConfig(kl_estimator="k4")  # refused
StrategyConfig(1)  # refused
text: str = config.seed  # refused
config.sed  # refused
"""


@pytest.mark.parametrize("plugin", ["plugins = pydantic.mypy", ""], ids=["with pydantic's plugin", "without"])
def test_a_type_checker_accepts_right_calls_and_refuses_wrong_ones(tmp_path, plugin):
    (tmp_path / "calls.py").write_text(CALLS)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\nfollow_imports = silent\n{plugin}\n")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "calls.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    refused = {int(line.split(":")[1]) for line in run.stdout.splitlines() if ": error: " in line}
    marked = {number for number, line in enumerate(CALLS.splitlines(), 1) if line.endswith("# refused")}
    assert refused == marked, run.stdout + run.stderr


def test_the_signature_lists_every_setting():
    parameters = inspect.signature(StrategyConfig).parameters
    assert parameters.keys() == StrategyConfig.model_fields.keys()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
