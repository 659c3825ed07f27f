"""Beginning and ending: what a lifetime leaves behind, and what happens where a rank is lost."""

import os
import subprocess
import sys

import ds_cases_lifetimes as cases
import pytest
import torch.distributed as dist
from traces import added
from workers import Workers

from lightrft.config import ConfigError, StrategyConfig
from lightrft.deepspeed import DeepspeedStrategy
from lightrft.strategy import get_strategy

STAGES = (0, 1, 2, 3)


def test_repeated_lifetimes_leak_nothing_on_every_stage(two: Workers) -> None:
    for _ in range(2):  # the first time round DeepSpeed and torch start what they keep
        rounds = two.run(cases.lives, stages=(3, 2, 1, 0, 3, 0, 2, 3))
    for got in rounds:
        first = got[0]
        assert first["process group"] is False
        assert first["models"] == 0
        assert first["linear"] == "torch._C._nn"
        for later in got[1:]:
            assert added(first, later) == {}
    assert not any(name.startswith(("DS_", "LOCAL_SIZE", "TORCH_EXT")) for name in rounds[0][0]["environment"])


def test_models_of_closed_strategies_are_freed(one: Workers) -> None:
    ((_, second, third, fourth),) = one.run(cases.memory_of_lives, count=4)
    assert second == third == fourth


@pytest.mark.parametrize("stage", STAGES)
def test_the_callers_process_group_is_not_destroyed(one: Workers, stage: int) -> None:
    assert one.run(cases.in_the_callers_group, stage=stage) == [(True, 1.0)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_process_group_has_the_timeout_before_a_model_is_prepared(two: Workers, stage: int) -> None:
    assert two.run(cases.groups_and_timeouts, stage=stage) == [(0, {17.0})] * 2


@pytest.mark.parametrize(
    ("stage", "call"), [(1, "optimizer_step"), (2, "backward"), (3, "backward"), (3, "optimizer_step")]
)
def test_a_lost_rank_is_an_error_with_the_name_of_the_call(two: Workers, stage: int, call: str) -> None:
    (message, seconds), _ = two.run(cases.left_alone, stage=stage, call=call)
    assert message.startswith(f"{call}: rank 0 of 2 waited for another rank")
    assert seconds < 5
    two.run(cases.lives, stages=(stage,))  # a new lifetime is sound


def test_a_rank_that_fails_in_its_forward_pass_closes_without_the_others(two: Workers) -> None:
    other, failing = two.run(cases.failing_in_a_forward)
    assert failing[0] == "IndexError"
    assert other[0] == "StrategyError" and other[1].startswith("forward: rank 0 of 2 waited for another rank")
    two.run(cases.lives, stages=(3,))  # a new lifetime is sound


def alone_without_torchrun() -> str:
    program = (
        "from pathlib import Path\n"
        "import torch\n"
        "from lightrft.strategy import get_strategy\n"
        "with get_strategy({'zero_stage': 2, 'bf16': False, 'device': 'cpu', 'engine_type': 'fake'}) as strategy:\n"
        "    model = torch.nn.Linear(3, 2)\n"
        "    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.1), None))\n"
        "    strategy.backward(model(torch.ones(1, 3)).sum(), model, optimizer)\n"
        "    print(strategy.world_size, strategy.name, strategy.optimizer_step(optimizer, model, boundary=True).applied)\n"
        "threads = [name.read_text() for name in Path('/proc/self/task').glob('*/comm')]\n"
        "print([name for name in threads if 'gloo' in name])\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.stdout


def test_without_torchrun_it_is_a_world_of_one_whose_group_ends_with_its_threads() -> None:
    assert alone_without_torchrun() == "1 deepspeed True\n[]\n"


def test_a_device_that_the_environment_contradicts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(ConfigError, match="DS_ACCELERATOR='xpu' in the environment"):
        DeepspeedStrategy(StrategyConfig(device="cpu"))
    assert not dist.is_initialized()


def test_it_is_what_auto_means() -> None:
    with get_strategy(StrategyConfig(device="cpu", engine_type="fake")) as made:
        assert isinstance(made, DeepspeedStrategy)
