"""Loading checkpoints in one process: exact resumption, and what does not match."""

import numpy as np
import pytest
import torch
from checkpoint_models import in_training, same, update, weights
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR

from lightrft.config import (
    CheckpointError,
)
from lightrft.strategy import FakeStrategy, get_fake_strategy
from lightrft.strategy.fake_strategy import FakeBackend


@pytest.fixture
def strategy():
    with get_fake_strategy(bf16=False, train_batch_size=1) as made:
        yield made


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


def test_numpy_learning_rates_can_be_saved(strategy, tmp_path):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.5))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, np.float64(0.5))
    strategy.prepare((model, optimizer, scheduler))
    strategy.save_ckpt(model, tmp_path)
    optimizer.param_groups[0]["lr"] = scheduler.gamma = 0.25
    strategy.load_ckpt(model, tmp_path)
    assert (optimizer.param_groups[0]["lr"], scheduler.gamma) == (0.5, 0.5)


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
