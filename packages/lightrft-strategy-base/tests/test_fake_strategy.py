"""What FakeStrategy refuses, and what it accepts and the other strategies refuse."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from denominator_cases import Plain
from torch import nn

from lightrft.config import ArgumentTypeError, ConfigError, StrategyError
from lightrft.strategy import FakeStrategy, get_fake_strategy, get_strategy

ONE = {"bf16": False, "train_batch_size": 1}


def bare():
    model = nn.Linear(2, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def updated(strategy, model, optimizer):
    strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
    return strategy.optimizer_step(optimizer, model)


@pytest.mark.parametrize("make", [FakeStrategy, get_fake_strategy, lambda: get_strategy({"strategy": "fake"})])
def test_one_of_several_processes_is_refused(monkeypatch, make):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=r"expected one process for strategy 'fake', got 2 .*Start .*without torchrun"
    ):
        make()


@pytest.mark.parametrize("make", [FakeStrategy, Plain])
@pytest.mark.parametrize(
    ("variable", "launcher"),
    [("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun"), ("SLURM_STEP_NUM_TASKS", "srun")],
)
def test_processes_of_a_launcher_that_gives_no_rank_do_not_train_by_themselves(monkeypatch, make, variable, launcher):
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ConfigError, match=rf"get_strategy: expected .* 2 .*{launcher}.*{variable}"):
        make(device="cpu")


@pytest.mark.parametrize("make", [FakeStrategy, Plain])
@pytest.mark.parametrize("told", [{"SLURM_NTASKS": "8"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"PMI_SIZE": "many"}])
def test_one_process_of_a_launcher_trains(monkeypatch, make, told):
    for variable, value in told.items():
        monkeypatch.setenv(variable, value)
    with make(device="cpu") as strategy:
        assert strategy.world_size == 1


def test_torchrun_with_one_process_is_accepted(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    FakeStrategy().close()


def test_a_process_group_of_several_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="expected one process for strategy 'fake', got 3"):
        FakeStrategy()


def test_under_torchrun_every_rank_raises(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from lightrft.strategy import get_strategy\n"
        "try:\n    get_strategy({'strategy': 'fake'})\n"
        "except ValueError as error:\n    print('refused:', error, flush=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.stdout.count("refused: get_strategy: expected one process") == 2, result.stdout + result.stderr


def test_a_model_that_was_not_prepared_is_named_once(caplog, tmp_path):
    with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
        for _ in range(2):
            assert updated(strategy, *bare()).applied
        strategy.save_ckpt(nn.Linear(1, 1), tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        "Linear is used without prepare, which this strategy accepts and the others refuse. Call "
        "prepare((model, optimizer, scheduler)), and use what it returns"
    ]


def other_use(strategy, model, optimizer):
    strategy.prepare((model, optimizer, None))


@pytest.mark.parametrize("use", [updated, other_use, lambda strategy, model, _: strategy.prepare(nn.Sequential(model))])
def test_a_model_of_another_open_strategy_is_refused_before_anything_changes(use):
    with FakeStrategy(**ONE) as first, FakeStrategy(**ONE) as second:
        model, optimizer = bare()
        first.prepare((model, optimizer, None))
        before = model.weight.clone()
        with pytest.raises(StrategyError, match=r"shares 2 with Linear of another open strategy .*close the other"):
            use(second, model, optimizer)
        assert torch.equal(model.weight, before)
        assert model.weight.requires_grad
        assert updated(first, model, optimizer).applied


def test_a_model_of_a_strategy_that_was_closed_is_accepted():
    model, optimizer = bare()
    with FakeStrategy(**ONE) as first:
        first.prepare((model, optimizer, None))
    with FakeStrategy(**ONE) as second:
        second.prepare((model, optimizer, None))
        assert updated(second, model, optimizer).applied


def test_a_prepared_model_causes_no_warning(caplog, tmp_path):
    with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = bare()
        strategy.prepare((model, optimizer, None))
        updated(strategy, model, optimizer)
        strategy.save_ckpt(model, tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("make", [FakeStrategy, get_fake_strategy])
def test_a_strict_strategy_refuses_models_that_were_not_prepared(make, tmp_path):
    with make(strict=True, bf16=False, train_batch_size=1) as strategy:
        assert "unprepared_models" not in strategy.capabilities
        model, optimizer = bare()
        with pytest.raises(
            StrategyError, match=r"backward: expected a model in training, .*not prepared. Call prepare"
        ):
            updated(strategy, model, optimizer)
        with pytest.raises(StrategyError, match="save_ckpt: expected a model that this strategy has prepared"):
            strategy.save_ckpt(model, tmp_path)
        with pytest.raises(StrategyError, match="save_ckpt: expected a model in training"):
            strategy.save_ckpt(model, tmp_path, optimizer=optimizer)
        strategy.prepare((model, optimizer, None))
        assert updated(strategy, model, optimizer).applied


def test_strict_is_true_or_false():
    with pytest.raises(ArgumentTypeError, match=r"FakeStrategy: expected strict to be True or False, got 'no' \(str\)"):
        FakeStrategy(strict="no")
