"""Moving averages of a model in training, in one process."""

import warnings

import pytest
import torch
from torch import nn

from lightrft.config import ArgumentError
from lightrft.strategy import get_fake_strategy


class Normalised(nn.Module):
    """A model with buffers that training changes."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.norm(x))


def trained_by_sgd(strategy, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    strategy.prepare((model, optimizer, None))
    return model, optimizer


def updated(strategy, model, optimizer, times=1):
    for _ in range(times):
        strategy.backward(model(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).sum(), model, optimizer)
        strategy.optimizer_step(optimizer, model)


def average_of(strategy, kind=nn.Linear, *size):
    """An average whose parameters are all zero."""
    average = kind(*size)
    for parameter in average.parameters():
        nn.init.zeros_(parameter)
    return strategy.prepare(average)


def test_an_average_without_the_parameters_of_its_model_is_refused_each_time():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        other = strategy.prepare(nn.Sequential(nn.Linear(2, 1)))
        updated(strategy, model, optimizer)
        for _ in range(2):
            with pytest.raises(ArgumentError, match="the average has no weight"):
                strategy.moving_average(model, other)


def test_an_average_moves_with_the_updates_after_it_was_made():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        updated(strategy, model, optimizer, times=3)
        average = average_of(strategy, nn.Linear, 2, 1)
        strategy.moving_average(model, average, beta=0.5)
        assert not average.weight.any()
        updated(strategy, model, optimizer)
        for _ in range(2):
            strategy.moving_average(model, average, beta=0.5)
        assert torch.equal(average.weight, 0.5 * model.weight)


def test_an_average_of_two_models_moves_with_the_updates_of_both():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        average = average_of(strategy, nn.Linear, 2, 1)
        first, second = (trained_by_sgd(strategy, nn.Linear(2, 1)) for _ in range(2))
        updated(strategy, *first)
        updated(strategy, *second)
        strategy.moving_average(first[0], average, beta=0.5)
        strategy.moving_average(second[0], average, beta=0.5)
        assert torch.equal(average.weight, 0.25 * first[0].weight + 0.5 * second[0].weight)


def test_an_average_does_not_move_because_its_model_was_loaded(tmp_path):
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        updated(strategy, model, optimizer, times=2)
        strategy.save_ckpt(model, tmp_path)
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        average = average_of(strategy, nn.Linear, 2, 1)
        updated(strategy, model, optimizer)
        strategy.load_ckpt(model, tmp_path)
        strategy.moving_average(model, average, beta=0.5)
        assert not average.weight.any()
        updated(strategy, model, optimizer)
        strategy.moving_average(model, average, beta=0.5)
        assert torch.equal(average.weight, 0.5 * model.weight)


@pytest.mark.parametrize("when", ["made late", "behind by one"])
def test_a_checkpoint_knows_whether_an_average_includes_the_last_update(tmp_path, when):
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        early = average_of(strategy, nn.Linear, 2, 1)
        updated(strategy, model, optimizer, times=2)
        late = average_of(strategy, nn.Linear, 2, 1)
        strategy.save_ckpt({"model": model, "average": late if when == "made late" else early}, tmp_path)
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        average = average_of(strategy, nn.Linear, 2, 1)
        strategy.load_ckpt({"model": model, "average": average}, tmp_path)
        for _ in range(2):
            strategy.moving_average(model, average, beta=0.5)
        assert torch.equal(average.weight, (0.0 if when == "made late" else 0.5) * model.weight)


def test_buffers_that_training_changes_are_not_averaged_with_one_warning():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        average = average_of(strategy, Normalised)
        model, optimizer = trained_by_sgd(strategy, Normalised())
        updated(strategy, model, optimizer)
        with pytest.warns(UserWarning, match=r"parameters only.*Normalised.*\(norm.running_mean first\)"):
            strategy.moving_average(model, average)
        assert not average.norm.running_mean.any()
        updated(strategy, model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            strategy.moving_average(model, average)


def test_a_new_average_inherits_nothing_from_a_deleted_one():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        trained_by_sgd(strategy, nn.Linear(2, 1))
        for _ in range(20):  # memory is used again, and so is its address
            average = nn.Linear(2, 1)
            assert strategy._averages.updates_in(average, strategy._models.in_training) == 0
            strategy._averages.restore(average, 1)
            del average


def test_a_moving_average_of_tensors_in_another_order():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
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
