"""Checkpoints of earlier versions load. `checkpoint_of_0_1_0` was saved by version 0.1.0, after two updates.

Its client state has what that run had next: weights, learning rate, draws from the random streams, a batch.
"""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightrft.config import CheckpointError
from lightrft.strategy import get_fake_strategy

SAVED = Path(__file__).with_name("checkpoint_of_0_1_0")


def tensors(lists):
    return {name: torch.tensor(values) for name, values in lists.items()}


def assert_close(model, lists, **tolerance):
    expected = tensors(lists)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), **tolerance)


@pytest.fixture
def strategy():
    with get_fake_strategy(bf16=False, train_batch_size=1, seed=7) as made:
        yield made


def prepared(strategy):
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return strategy.prepare((model, optimizer, scheduler))


def test_a_run_of_version_0_1_0_continues(strategy):
    model, optimizer, scheduler = prepared(strategy)
    loader = strategy.setup_dataloader(list(range(12)), 2, shuffle=True)
    path, state = strategy.load_ckpt(model, SAVED)
    assert path == SAVED / "global_step2"
    assert [random.random(), float(np.random.rand()), torch.rand(1).item()] == state["draws"]
    assert_close(model, state["weights"], rtol=0, atol=0)
    assert scheduler.get_last_lr() == state["lr"] == [group["lr"] for group in optimizer.param_groups]
    assert next(iter(loader)).tolist() == state["batch"]
    strategy.backward(model(torch.linspace(-1, 1, 12).view(4, 3) * 3).pow(2).mean(), model, optimizer)
    strategy.optimizer_step(optimizer, model, scheduler)
    assert_close(model, state["next weights"], rtol=1e-5, atol=1e-6)


def test_a_run_of_version_0_1_0_is_saved_again_beside_its_checkpoint(strategy, tmp_path):
    shutil.copytree(SAVED, tmp_path / "run")
    model, *_ = prepared(strategy)
    strategy.load_ckpt(model, tmp_path / "run")
    strategy.save_ckpt(model, tmp_path / "run", tag="next", max_num=1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "next"]


def test_a_damaged_checkpoint_of_version_0_1_0_is_refused(strategy, tmp_path):
    shutil.copytree(SAVED, tmp_path / "run")
    file = tmp_path / "run" / "global_step2" / "rank-00000-of-00001.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged: .* does not match its checksum"):
        strategy.load_ckpt(prepared(strategy)[0], tmp_path / "run")
