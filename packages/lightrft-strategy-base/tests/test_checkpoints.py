"""Checkpoints in one process: the store, the format, what fits what, and the end of a run."""

import enum
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR

from lightrft.config import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    StrategyError,
)
from lightrft.strategy import FakeStrategy, StepResult, get_fake_strategy
from lightrft.strategy.checkpoint.background import Staging
from lightrft.strategy.checkpoint.checkpoint_reader import CheckpointReader, fragments
from lightrft.strategy.checkpoint.format import Manifest, Piece, Stamp, decode_header, encode_header, header_length
from lightrft.strategy.checkpoint.plan import check_covered, choose_writers
from lightrft.strategy.checkpoint.save_checkpoint import CheckpointWrite, TagWriter
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.storage.safe_json import from_json, to_json
from lightrft.strategy.tensors import memory_of


@pytest.fixture
def strategy():
    with get_fake_strategy(bf16=False, train_batch_size=1) as made:
        yield made


def in_training(strategy, kind=None, width=4, **settings):
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    optimizer = (kind or torch.optim.AdamW)(model.parameters(), **{"lr": 0.01, **settings})
    strategy.prepare((model, optimizer, None))
    return model, optimizer


def update(strategy, model, optimizer, count=1):
    for _ in range(count):
        strategy.backward(model(torch.randn(4, 3)).pow(2).mean(), model, optimizer)
        strategy.optimizer_step(optimizer, model)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def resumes_exactly(strategy, folder, kind, **settings):
    model, optimizer = in_training(strategy, kind, **settings)
    update(strategy, model, optimizer, 2)
    strategy.save_ckpt(model, folder)
    update(strategy, model, optimizer, 2)
    other, its = in_training(strategy, kind, **settings)
    strategy.load_ckpt(other, folder)
    update(strategy, other, its, 2)
    return same(weights(model), weights(other))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_every_optimizer_of_torch_resumes_exactly(strategy, tmp_path, kind, settings):
    assert resumes_exactly(strategy, tmp_path, kind, **settings)


def test_several_models_are_one_checkpoint_and_load_together_or_apart(strategy, tmp_path):
    (actor, optimizer), (critic, its) = in_training(strategy), in_training(strategy, width=6)
    update(strategy, actor, optimizer)
    update(strategy, critic, its, 2)
    kept, path = weights(critic), strategy.save_ckpt({"actor": actor, "critic": critic}, tmp_path)
    assert path.name == "global_step1"
    update(strategy, critic, its)
    strategy.load_ckpt({"critic": critic}, tmp_path)
    assert same(weights(critic), kept)
    with pytest.raises(CheckpointError, match=r"holds \('actor', 'critic'\), got 'model'"):
        strategy.load_ckpt(actor, tmp_path)


def test_one_model_does_not_take_the_place_of_another_under_the_same_tag(strategy, tmp_path):
    (actor, _), (critic, _) = in_training(strategy), in_training(strategy)
    strategy.save_ckpt(actor, tmp_path, tag="t")
    strategy.save_ckpt(actor, tmp_path, tag="t")
    with pytest.raises(StrategyError, match=r"would be replaced\. Save models together"):
        strategy.save_ckpt(critic, tmp_path, tag="t")


def test_saving_under_a_tag_again_replaces_it_and_makes_it_the_newest(strategy, tmp_path):
    model, optimizer = in_training(strategy)
    for tag in ("a", "b", "a"):
        update(strategy, model, optimizer)
        strategy.save_ckpt(model, tmp_path, tag=tag)
    kept = weights(model)
    update(strategy, model, optimizer)
    assert strategy.load_ckpt(model, tmp_path)[0].name == "a"
    assert same(weights(model), kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest"]


def test_a_checkpoint_saved_without_save_latest_loads_only_by_its_tag(strategy, tmp_path):
    model, _ = in_training(strategy)
    strategy.save_ckpt(model, tmp_path, tag="a")
    strategy.save_ckpt(model, tmp_path, tag="b", save_latest=False)
    assert strategy.load_ckpt(model, tmp_path)[0].name == "a"
    assert strategy.load_ckpt(model, tmp_path, tag="b")[0].name == "b"


def latest_of(folder):
    return (folder / "latest").read_text().strip()


def test_rotation_keeps_what_is_loaded_without_a_tag(strategy, tmp_path):
    model, _ = in_training(strategy)
    strategy.save_ckpt(model, tmp_path, tag="a", max_num=1)
    (tmp_path / "latest").unlink()
    for tag in ("b", "c"):
        strategy.save_ckpt(model, tmp_path, tag=tag, max_num=1, save_latest=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "latest"]
    assert strategy.load_ckpt(model, tmp_path)[0].name == latest_of(tmp_path) == "a"
    strategy.save_ckpt(model, tmp_path, tag="d", max_num=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "latest"]


def test_latest_never_names_a_checkpoint_saved_without_save_latest(strategy, tmp_path):
    model, _ = in_training(strategy)
    for tag in ("a", "b"):
        strategy.save_ckpt(model, tmp_path, tag=tag)
    strategy.save_ckpt(model, tmp_path, tag="b", save_latest=False)
    assert latest_of(tmp_path) == "a"
    strategy.save_ckpt(model, tmp_path, tag="a", save_latest=False)
    assert not (tmp_path / "latest").exists()
    with pytest.raises(
        CheckpointNotFoundError, match=r"can be loaded without its tag in .*found none. Available: b, a"
    ):
        strategy.load_ckpt(model, tmp_path)


def spoil(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [spoil, Path.unlink])
@pytest.mark.parametrize("named", [True, False])
def test_a_damaged_newest_checkpoint_is_named_with_the_undamaged_ones(strategy, tmp_path, damage, named):
    model, _ = in_training(strategy)
    for tag in ("a", "b", "c"):
        strategy.save_ckpt(model, tmp_path, tag=tag)
    damage(tmp_path / "c" / "manifest.json")
    if not named:
        (tmp_path / "latest").unlink()
    for tag in (None, "c"):
        with pytest.raises(CheckpointError, match=r"c/manifest.json.*load another tag \(intact: a, b\)"):
            strategy.load_ckpt(model, tmp_path, tag=tag)
    assert strategy.load_ckpt(model, tmp_path, tag="b")[0].name == "b"


def test_an_older_damaged_checkpoint_is_passed_over_with_a_warning(strategy, tmp_path, caplog):
    model, _ = in_training(strategy)
    for tag in ("a", "b"):
        strategy.save_ckpt(model, tmp_path, tag=tag)
    spoil(tmp_path / "a" / "manifest.json")
    with caplog.at_level(logging.WARNING):
        assert strategy.load_ckpt(model, tmp_path)[0].name == "b"
    assert f"cannot read {tmp_path / 'a' / 'manifest.json'}: its contents" in caplog.text


def test_a_directory_that_cannot_be_read_is_named(strategy, tmp_path, monkeypatch):
    model, _ = in_training(strategy)
    strategy.save_ckpt(model, tmp_path)

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(CheckpointError, match=rf"cannot list {tmp_path}: Permission denied"):
        strategy.load_ckpt(model, tmp_path)


def test_a_directory_that_is_no_checkpoint_is_not_replaced(strategy, tmp_path):
    model, _ = in_training(strategy)
    (tmp_path / "t").mkdir()
    with pytest.raises(
        CheckpointError, match=r"t to be new, or a checkpoint of these models that can be replaced: cannot read"
    ):
        strategy.save_ckpt(model, tmp_path, tag="t")


def test_a_replaced_checkpoint_counts_until_the_new_one_is_committed(strategy, tmp_path):
    model, optimizer = in_training(strategy)
    strategy.save_ckpt(model, tmp_path, tag="t")
    (tmp_path / "t").rename(tmp_path / ".t.replaced")  # killed between the two renames
    assert strategy.load_ckpt(model, tmp_path, tag="t")[0].name == ".t.replaced"
    update(strategy, model, optimizer)
    strategy.save_ckpt(model, tmp_path, tag="u")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "t", "u"]


def test_a_foreign_hidden_directory_is_not_cleaned_up(strategy, tmp_path):
    model, _ = in_training(strategy)
    (tmp_path / ".mine.writing").mkdir()
    (tmp_path / ".mine.writing" / "notes.txt").touch()
    strategy.save_ckpt(model, tmp_path, tag="t")
    assert (tmp_path / ".mine.writing" / "notes.txt").exists()


@pytest.mark.parametrize("tag", ["", ".", "..", ".x", "a/b", "/a", "latest", "a\0b", "a\nb", "a "])
def test_tags_that_are_no_names_of_directories(strategy, tmp_path, tag):
    model, _ = in_training(strategy)
    for call in (strategy.save_ckpt, strategy.load_ckpt):
        with pytest.raises(ArgumentError, match=r"_ckpt: expected tag to be a directory name, got .*Use printable"):
            call(model, tmp_path, tag=tag)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tag", [5, True, b"t", ["t"], Path("t"), object()])
def test_tags_that_are_no_strings(strategy, tmp_path, tag):
    model, _ = in_training(strategy)
    for call in (strategy.save_ckpt, strategy.load_ckpt):
        with pytest.raises(ArgumentTypeError, match=r"_ckpt: expected tag to be a string, got"):
            call(model, tmp_path, tag=tag)


@pytest.mark.parametrize(
    "limits", [{"max_num": True}, {"max_num": 2.0}, {"max_num": "2"}, {"max_mem": True}, {"max_mem": "9"}]
)
def test_limits_that_are_no_numbers(strategy, tmp_path, limits):
    model, _ = in_training(strategy)
    with pytest.raises(ArgumentTypeError, match=rf"save_ckpt: expected {next(iter(limits))} to be int.*, got"):
        strategy.save_ckpt(model, tmp_path, **limits)
    assert not list(tmp_path.iterdir())


def test_a_missing_tag_lists_the_available_ones(strategy, tmp_path):
    model, _ = in_training(strategy)
    path = strategy.save_ckpt(model, tmp_path, tag="t")
    with pytest.raises(CheckpointNotFoundError, match=r"expected checkpoint 'u' in .*Available: t"):
        strategy.load_ckpt(model, tmp_path, tag="u")
    with pytest.raises(CheckpointNotFoundError, match="This is a checkpoint itself: load from"):
        strategy.load_ckpt(model, path)


def test_limits_below_one_are_refused(strategy, tmp_path):
    model, _ = in_training(strategy)
    for limits in ({"max_num": 0}, {"max_num": -1}, {"max_mem": 0}, {"max_mem": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(limits))):
            strategy.save_ckpt(model, tmp_path, **limits)
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_shape_is_refused_by_name(strategy, tmp_path):
    (model, _), (other, _) = in_training(strategy), in_training(strategy, width=5)
    strategy.save_ckpt(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"expected 0.weight to have shape \(4, 3\), .* got \(5, 3\)"):
        strategy.load_ckpt(other, tmp_path, load_module_strict=False)


def test_damage_is_reported_before_a_mismatch_of_the_model(strategy, tmp_path):
    (model, _), (other, _) = in_training(strategy), in_training(strategy, width=5)
    file = strategy.save_ckpt(model, tmp_path) / "rank-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"safetensors is damaged: .* does not match its checksum"):
        strategy.load_ckpt(other, tmp_path)


def test_weights_without_optimizer_state_load_only_if_requested(strategy, tmp_path):
    model, _ = in_training(strategy)
    alone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    strategy.prepare(alone)
    strategy.save_ckpt(alone, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"optimizer of Sequential to be none, as in .* got AdamW.* load_optimizer_states=False"
    ):
        strategy.load_ckpt(model, tmp_path)
    strategy.load_ckpt(model, tmp_path, load_module_only=True)
    assert same(weights(model), weights(alone))


@pytest.mark.parametrize("here", [torch.optim.SGD, torch.optim.Adam])
def test_the_state_of_another_optimizer_is_refused(strategy, tmp_path, here):
    (model, optimizer), (other, _) = in_training(strategy), in_training(strategy, here)
    update(strategy, model, optimizer)
    strategy.save_ckpt(model, tmp_path)
    before = weights(other)
    with pytest.raises(CheckpointError, match=rf"optimizer of Sequential to be AdamW, .* got {here.__name__}"):
        strategy.load_ckpt(other, tmp_path)
    assert same(weights(other), before)
    strategy.load_ckpt(other, tmp_path, load_optimizer_states=False)
    assert same(weights(other), weights(model))


def test_the_state_of_another_schedule_is_refused(strategy, tmp_path):
    def scheduled(kind, **settings):
        model = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        return strategy.prepare((model, optimizer, kind(optimizer, **settings)))[0]

    model = scheduled(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    other = scheduled(torch.optim.lr_scheduler.StepLR, step_size=2)
    strategy.save_ckpt(model, tmp_path)
    before = weights(other)
    with pytest.raises(CheckpointError, match=r"scheduler of Linear to be ExponentialLR, .* got StepLR"):
        strategy.load_ckpt(other, tmp_path)
    assert same(weights(other), before)
    strategy.load_ckpt(other, tmp_path, load_lr_scheduler_states=False)
    assert same(weights(other), weights(model))


def stepwise(strategy, *parts):
    """A model with a schedule of these, one after the other, at a step each."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = SequentialLR(optimizer, [part(optimizer) for part in parts], list(range(2, len(parts) + 1)))
    return strategy.prepare((model, optimizer, schedule))[0]


@pytest.mark.parametrize("here", [[ConstantLR] * 2, [ConstantLR] * 4, [ConstantLR, ConstantLR, LinearLR]])
def test_a_schedule_with_other_parts_is_refused_before_anything_changes(strategy, tmp_path, here):
    strategy.save_ckpt(stepwise(strategy, *[ConstantLR] * 3), tmp_path)
    model = stepwise(strategy, *here)
    before = weights(model)
    with pytest.raises(
        CheckpointError, match="scheduler of Linear to be SequentialLR of ConstantLR, ConstantLR, ConstantLR, as in"
    ):
        strategy.load_ckpt(model, tmp_path)
    assert same(weights(model), before)


class CopyingBackend(FakeBackend):
    """Moves state to other memory, as between devices."""

    def move_optimizer(self, trained, device):
        for state in trained.optimizer.state.values():
            state.update({name: value.clone() for name, value in state.items() if value.ndim})


class Copies(FakeStrategy):
    """Supports offloading."""

    backend_class = CopyingBackend
    supported_settings = frozenset({"adam_offload"})


def test_the_state_of_an_offloaded_optimizer_is_loaded_on_its_device(tmp_path):
    with Copies(None, bf16=False, train_batch_size=1, adam_offload=True) as strategy:
        model, optimizer = in_training(strategy)
        update(strategy, model, optimizer)
        strategy.save_ckpt(model, tmp_path)
        wanted = [state["exp_avg"].clone() for state in optimizer.state.values()]
        other, its = in_training(strategy)
        strategy.maybe_offload_optimizer(its)
        strategy.load_ckpt(other, tmp_path)
        strategy.maybe_load_optimizer(its)
        assert all(torch.equal(a["exp_avg"], b) for a, b in zip(its.state.values(), wanted, strict=True))


@pytest.mark.parametrize(("there", "here"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float32)])
def test_state_is_cast_to_the_dtype_of_its_parameter(strategy, tmp_path, there, here):
    model = nn.Linear(3, 2).to(there)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, dtype=there)).sum().backward()
    optimizer.step()
    strategy.save_ckpt(model, tmp_path, optimizer=optimizer)
    other = nn.Linear(3, 2).to(here)
    its = torch.optim.AdamW(other.parameters())
    strategy.load_ckpt(other, tmp_path, optimizer=its)
    for mine, saved in zip(its.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], saved["exp_avg"].to(here))
    strategy.backward(other(torch.ones(3, dtype=here)).sum(), other, its)
    assert strategy.optimizer_step(its, other, boundary=True).applied


def test_unprepared_models_are_saved_with_the_optimizer_that_is_passed(strategy, tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    update(strategy, model, optimizer)
    strategy.save_ckpt(model, tmp_path)
    other = nn.Linear(3, 1)
    strategy.load_ckpt(other, tmp_path, optimizer=torch.optim.AdamW(other.parameters()))
    assert same(weights(model), weights(other))


def test_tensors_with_another_memory_order_are_restored_exactly(strategy, tmp_path):
    def in_another_order():
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 1)).to(memory_format=torch.channels_last)
        model.register_buffer("transposed", torch.randn(2, 3).t())
        model.register_buffer("every_second", torch.randn(6)[::2])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        strategy.prepare((model, optimizer, None))
        return model, optimizer

    def train(model, optimizer):
        inputs = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
        strategy.backward(model(inputs).pow(2).mean(), model, optimizer)
        strategy.optimizer_step(optimizer, model)

    model, optimizer = in_another_order()
    train(model, optimizer)
    kept = weights(model)
    strategy.save_ckpt(model, tmp_path)
    train(model, optimizer)
    other, its = in_another_order()
    strategy.load_ckpt(other, tmp_path)
    assert same(weights(other), kept)
    train(other, its)
    assert same(weights(model), weights(other))
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_moving_average_of_tensors_in_another_order(strategy):
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    average = nn.Conv2d(3, 4, 2)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    strategy.prepare((model, optimizer, None), average)
    before = model.weight.detach().clone()
    strategy.backward(model(torch.randn(1, 3, 2, 2)).sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    strategy.moving_average(model, average, beta=0.5)
    assert torch.equal(average.weight, before * 0.5 + model.weight * 0.5)


def test_a_dtype_that_files_cannot_store_is_named(strategy, tmp_path):
    model, _ = in_training(strategy)
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(
        CheckpointError, match=r"model/buffers/wave .*support \(float64, float32.*got torch.complex64. Cast it"
    ):
        strategy.save_ckpt(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_single_element_has_bytes_whatever_its_stride(dtype):
    single = torch.ones(10, dtype=dtype)[::5][:1]
    assert bytes(memory_of(single)) == bytes(memory_of(torch.ones(1, dtype=dtype)))


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


def test_sigterm_requests_a_stop_at_the_next_update_and_saves_as_the_block_is_left(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    strategy = FakeStrategy(bf16=False, train_batch_size=2)
    model, optimizer = in_training(strategy)

    with strategy.saving_on_sigterm(lambda: strategy.save_ckpt(model, tmp_path)):
        strategy.backward(model(torch.randn(4, 3)).mean(), model, optimizer)
        os.kill(os.getpid(), signal.SIGTERM)
        strategy.optimizer_step(optimizer, model)
        assert not strategy.stop_requested  # the model has a gradient pending
        update(strategy, model, optimizer)
        assert strategy.stop_requested
        assert not list(tmp_path.iterdir())
    assert (tmp_path / "global_step1").is_dir()
    assert signal.getsignal(signal.SIGTERM) == before
    strategy.all_reduce(1.0)  # open still
    strategy.close()


def test_nothing_is_saved_without_a_requested_stop_or_if_the_block_failed(strategy, tmp_path):
    model, _ = in_training(strategy)
    with strategy.saving_on_sigterm(lambda: strategy.save_ckpt(model, tmp_path)):
        pass
    with pytest.raises(TypeError), strategy.saving_on_sigterm(lambda: strategy.save_ckpt(model, tmp_path)):
        os.kill(os.getpid(), "no signal")
    assert not list(tmp_path.iterdir())


def test_saving_on_sigterm_requires_the_main_thread(strategy):
    raised = []

    def enter():
        try:
            with strategy.saving_on_sigterm(lambda: None):
                pass
        except StrategyError as error:
            raised.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in raised[0]


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_plain_values_are_restored_with_their_types(value):
    import json

    assert repr(from_json(json.loads(json.dumps(to_json(value, "v"))))) == repr(value)


class Mode(enum.StrEnum):
    FAST = "fast"


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    "value",
    [Mode.FAST, Level.HIGH, np.float64(0.5), np.int64(1), np.bool_(True), OrderedDict(a=1), StepResult(applied=True, skipped=False, grad_norm=None)],
    ids=repr,
)  # fmt: skip
def test_a_value_that_json_would_change_is_refused_before_anything_is_written(strategy, tmp_path, value):
    model, _ = in_training(strategy)
    with pytest.raises(
        ArgumentTypeError,
        match=r"save_ckpt: client_state\['run'\]\[0\]: expected None, bool, .* got a .*would not load as the same type",
    ):
        strategy.save_ckpt(model, tmp_path, client_state={"run": [value]})
    assert not list(tmp_path.iterdir())


def test_a_key_may_be_a_number_of_more_digits_than_python_writes():
    value = {10**5000: [1]}
    assert from_json(to_json(value, "client_state")) == value


def test_a_key_that_json_would_change_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"v \(key\): expected .* got a .*\.Mode, which"):
        to_json({Mode.FAST: 1}, "v")


def test_numpy_learning_rates_can_be_saved(strategy, tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.5))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, np.float64(0.5))
    strategy.prepare((model, optimizer, scheduler))
    strategy.save_ckpt(model, tmp_path)
    optimizer.param_groups[0]["lr"] = scheduler.gamma = 0.25
    strategy.load_ckpt(model, tmp_path)
    assert (optimizer.param_groups[0]["lr"], scheduler.gamma) == (0.5, 0.5)


def test_a_value_without_a_safe_form_is_named_by_its_path():
    with pytest.raises(ArgumentTypeError, match=r"v\['a'\]\[1\]: expected .* got a builtins.object"):
        to_json({"a": [1, object()]}, "v")


RANGES = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 4)), max_size=8, unique=True),
    min_size=1, max_size=4,
)  # fmt: skip


@given(RANGES)
def test_each_range_is_written_by_one_of_its_holders(held):
    chosen = choose_writers(held)
    assert set(chosen) == {value for ranges in held for value in ranges}
    assert all(value in held[rank] for value, rank in chosen.items())


def test_replicas_share_the_writing():
    ranges = [(entry, 0, 10) for entry in range(8)]
    chosen = list(choose_writers([ranges, ranges, ranges, ranges]).values())
    assert [chosen.count(rank) for rank in range(4)] == [2, 2, 2, 2]


@given(st.integers(0, 20), st.lists(st.integers(0, 20), max_size=4), st.data())
def test_any_range_is_assembled_from_any_pieces(numel, cuts, data):
    bounds = sorted({0, numel, *(value for value in cuts if value < numel)})
    pieces = [
        (0, Piece(entry="e", dtype=torch.uint8, shape=(numel,), offset=begin, numel=end - begin))
        for begin, end in itertools.pairwise(bounds)
    ]
    offset = data.draw(st.integers(0, numel))
    length = data.draw(st.integers(0, numel - offset))
    taken = [
        piece.offset + start + index
        for _, piece, start, count in fragments({"e": pieces}, "e", offset, length)
        for index in range(count)
    ]
    assert taken == list(range(offset, offset + length))


def test_a_gap_is_an_error():
    check_covered("e", 10, [(5, 5), (0, 5)])
    with pytest.raises(CheckpointError, match="hold all 10 elements of e, found no rank with those from 4 on"):
        check_covered("e", 10, [(5, 5), (0, 4)])


def test_a_header_describes_its_pieces():
    pieces = [
        Piece(entry=f"m/parameters/{name}", dtype=dtype, shape=(4, 2), offset=offset, numel=numel, checksum="0" * 8)
        for name, dtype, offset, numel in [("a", torch.float32, 0, 5), ("b@1", torch.bfloat16, 3, 5)]
    ]
    stamp = Stamp(tag="t", nonce="n")
    header = encode_header(pieces, stamp)
    assert header_length(header[:8], 10**6) == len(header)
    got, its = decode_header(header)
    assert its == stamp
    assert [(piece.entry, piece.dtype, piece.offset, piece.numel) for piece in got] == [
        (piece.entry, piece.dtype, piece.offset, piece.numel) for piece in pieces
    ]
    assert got[1].position - got[0].position == 20


def test_the_files_are_safetensors(strategy, tmp_path):
    from safetensors.torch import load_file

    model, _ = in_training(strategy)
    path = strategy.save_ckpt(model, tmp_path)
    stored = load_file(path / "rank-00000-of-00001.safetensors")
    assert torch.equal(stored["model/parameters/0.weight@0"], model[0].weight.detach().view(-1))


def test_pieces_of_full_cache_lines_are_aligned_to_lines_and_others_to_their_elements(strategy, tmp_path):
    model, optimizer = in_training(strategy, width=16)
    update(strategy, model, optimizer)
    with CheckpointReader(strategy.save_ckpt(model, tmp_path)) as got:
        pieces = [piece for _, piece in got.pieces]
    full_lines = [piece for piece in pieces if piece.nbytes % 64 == 0]
    assert full_lines and len(full_lines) < len(pieces)
    assert all(piece.position % 64 == 0 for piece in full_lines)
    assert all(piece.position % piece.dtype.itemsize == 0 for piece in pieces)


def test_a_checkpoint_is_read_without_a_strategy(strategy, tmp_path):
    model, _ = in_training(strategy)
    with CheckpointReader(strategy.save_ckpt(model, tmp_path)) as got:
        got.verify()
        assert got.models == ["model"]
        assert torch.equal(got.tensor("model/parameters/0.weight"), model[0].weight)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000-of-00001.safetensors"])
def test_files_of_two_saves_do_not_mix(strategy, tmp_path, name):
    model = strategy.prepare_model(nn.Linear(3, 2))
    one, other = (strategy.save_ckpt(model, tmp_path, tag=tag, client_state={"tag": tag}) for tag in ("one", "two"))
    rank_file = other / "rank-00000-of-00001.safetensors"
    assert rank_file.stat().st_size == (one / rank_file.name).stat().st_size
    shutil.copyfile(one / name, other / name)
    with pytest.raises(
        CheckpointError, match=rf"two/{rank_file.name} .* was written by another save \(tag '(one|two)'\)"
    ):
        strategy.load_ckpt(model, tmp_path, tag="two")


def test_every_changed_character_of_a_manifest_is_found(strategy, tmp_path):
    model, _ = in_training(strategy)
    text = (strategy.save_ckpt(model, tmp_path) / "manifest.json").read_text()
    assert Manifest.from_text(text).to_text() == text
    draw = random.Random(0)
    for position in draw.sample(range(len(text)), 50):
        with pytest.raises(CheckpointError):
            Manifest.from_text(text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :])


@pytest.mark.parametrize("lacking", ["models", "loaders", "client_state"])
def test_a_manifest_that_lacks_something_is_named(strategy, tmp_path, lacking):
    model, _ = in_training(strategy)
    path = strategy.save_ckpt(model, tmp_path, tag="t") / "manifest.json"
    manifest = Manifest.from_text(path.read_text())
    del manifest.state[lacking]
    path.write_text(manifest.to_text())
    with pytest.raises(CheckpointError, match=f"t/manifest.json.*KeyError: '{lacking}'"):
        strategy.load_ckpt(model, tmp_path, tag="t")


def test_a_store_lists_committed_checkpoints_oldest_first(strategy, tmp_path):
    model, _ = in_training(strategy)
    for tag in ("b", "c", "a"):
        strategy.save_ckpt(model, tmp_path, tag=tag)
    assert [checkpoint.tag for checkpoint in Store(Path(tmp_path)).committed()] == ["b", "c", "a"]


def test_copies_are_made_in_the_same_memory_each_time():
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


def test_loading_fills_existing_optimizer_state_in_place(strategy, tmp_path):
    model, optimizer = in_training(strategy)
    update(strategy, model, optimizer)
    strategy.save_ckpt(model, tmp_path)
    before = [state["exp_avg"] for state in optimizer.state.values()]
    wanted = [tensor.clone() for tensor in before]
    for tensor in before:
        tensor.zero_()
    strategy.load_ckpt(model, tmp_path)
    after = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(tensor is old for tensor, old in zip(after, before, strict=True))
    assert all(torch.equal(tensor, old) for tensor, old in zip(after, wanted, strict=True))


def test_checksums_use_the_configured_algorithm_and_any_strategy_reads_them(strategy, tmp_path):
    with get_fake_strategy(bf16=False, train_batch_size=1, ckpt_checksum="sha256") as other:
        model, _ = in_training(other)
        path = other.save_ckpt(model, tmp_path, tag="t")
    with CheckpointReader(path) as checkpoint:
        assert checkpoint.manifest.checksum == "sha256"
        assert {len(piece.checksum) for _, piece in checkpoint.pieces} == {64}
    here, _ = in_training(strategy)
    strategy.load_ckpt(here, tmp_path)
    assert same(weights(here), weights(model))
    file = next(path.glob("rank-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=file.name):
        strategy.load_ckpt(here, tmp_path)


MEMORY = """
import sys, torch
from pathlib import Path
from torch import nn
from lightrft.strategy import get_fake_strategy


def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def extra(action):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    action()
    return (memory("VmHWM") - before) / size


with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24)))
    optimizer = strategy.create_optimizer(model, lr=1e-3)
    strategy.prepare((model, optimizer, None))
    strategy.backward(model(torch.ones(1, 1024)).sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    size = sum(it.nbytes for it in model.parameters())
    print(extra(lambda: strategy.save_ckpt(model, sys.argv[1])), extra(lambda: strategy.load_ckpt(model, sys.argv[1])))
    print(extra(lambda: strategy.save_model(model, None, sys.argv[1] + "/out")))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_no_process_holds_a_second_copy_of_the_model(tmp_path):
    """Of 100 MB of weights, 300 with state: two chunks of 16 MB, and what Python needs, at most."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    got = [float(number) for number in done.stdout.split()]
    assert len(got) == 3 and max(got) < 0.5, got
