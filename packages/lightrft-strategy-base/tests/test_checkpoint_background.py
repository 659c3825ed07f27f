"""Checkpoints that are written in the background, in one process."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from checkpoint_models import in_training

from lightrft.config import (
    CheckpointError,
)
from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint.background import Staging
from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader
from lightrft.strategy.checkpoint.save_checkpoint import CheckpointWrite, TagWriter


def test_close_raises_a_failed_background_save(tmp_path, monkeypatch):
    strategy = FakeStrategy(bf16=False, train_batch_size=1, async_ckpt=True)
    model, _ = in_training(strategy)

    def refused(self, manifest):
        raise CheckpointError("no room")

    monkeypatch.setattr(TagWriter, "commit", refused)
    strategy.save_ckpt(model, tmp_path)
    with pytest.raises(CheckpointError, match="no room"):
        strategy.close()
    assert not list(tmp_path.iterdir())


ENDING = """
import sys, time
from pathlib import Path
from torch import nn
from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint.save_checkpoint import CheckpointWrite

begin = CheckpointWrite._begin
CheckpointWrite._begin = lambda self: time.sleep(1) or begin(self)
strategy = FakeStrategy(bf16=False, train_batch_size=1, async_ckpt=True)
strategy.save_ckpt(strategy.prepare(nn.Linear(1000, 1000)), sys.argv[1], tag="t")
"""


def ended_while_saving(folder):
    return subprocess.run([sys.executable, "-c", ENDING, str(folder)], capture_output=True, text=True, timeout=300)


def test_a_process_waits_for_its_last_checkpoint_before_it_exits(tmp_path):
    assert ended_while_saving(tmp_path).stderr == ""
    with CheckpointReader(tmp_path / "t") as got:
        got.verify()


def test_an_unobserved_failure_is_written_to_stderr(tmp_path):
    (tmp_path / "t").mkdir()
    assert (
        f"rank 0: {tmp_path}/t was not saved: CheckpointError: save_ckpt: expected {tmp_path}/t to be new"
        in ended_while_saving(tmp_path).stderr
    )


def test_a_save_waits_for_the_one_in_the_background(tmp_path, monkeypatch):
    running = []
    run = CheckpointWrite.run

    def counted(self, consensus):
        running.append(self)
        assert len(running) == 1
        time.sleep(0.2)
        run(self, consensus)
        running.remove(self)

    monkeypatch.setattr(CheckpointWrite, "run", counted)
    with FakeStrategy(bf16=False, train_batch_size=1, async_ckpt=True) as strategy:
        model, _ = in_training(strategy)
        for tag in ("a", "b"):
            strategy.save_ckpt(model, tmp_path, tag=tag)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest"]


def test_a_relative_directory_is_resolved_when_save_ckpt_is_called(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    begin = CheckpointWrite._begin

    def late(self):
        moved.wait()
        return begin(self)

    moved = threading.Event()
    monkeypatch.setattr(CheckpointWrite, "_begin", late)
    with FakeStrategy(bf16=False, train_batch_size=1, async_ckpt=True) as strategy:
        path = strategy.save_ckpt(in_training(strategy)[0], "checkpoints", tag="t")
        monkeypatch.chdir(tmp_path / "there")
        moved.set()
    assert path == tmp_path / "here" / "checkpoints" / "t"
    assert path.is_dir()


def test_background_copies_reuse_their_memory():
    staging = Staging()
    tensors = [torch.arange(5.0), torch.arange(3, dtype=torch.uint8), torch.zeros(0), torch.arange(4).bfloat16()]
    first = staging.copies(tensors)
    assert all(
        torch.equal(tensor, wanted) and tensor.dtype == wanted.dtype
        for tensor, wanted in zip(first, tensors, strict=True)
    )
    second = staging.copies([tensor + 1 for tensor in tensors])
    assert [tensor.data_ptr() for tensor in second] == [tensor.data_ptr() for tensor in first]
    assert torch.equal(first[0], tensors[0] + 1)
    assert torch.equal(staging.copies([torch.ones(1000)])[0], torch.ones(1000))
