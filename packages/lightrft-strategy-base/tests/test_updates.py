"""backward and optimizer_step in one process: what trains, and what is refused."""

import pytest
import torch
from torch import nn

from lightrft.config import ArgumentError, ArgumentTypeError, StrategyError, UnsupportedOperationError
from lightrft.strategy import FakeStrategy, get_fake_strategy


def in_training(strategy, model=None, optimizer=None):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5) if optimizer is None else optimizer
    return strategy.prepare((model, optimizer, None))[:2]


def update(strategy, model, optimizer, *arguments):
    strategy.backward(model(torch.ones(3, 2)).sum(), model, optimizer)
    return strategy.optimizer_step(optimizer, model, *arguments)


@pytest.mark.parametrize("when", ["before", "after"])
def test_frozen_parameters_of_an_optimizer_never_change(when):
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        if when == "before":
            model[0].requires_grad_(False)
        model, optimizer = in_training(strategy, model)
        model[0].requires_grad_(False)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        assert update(strategy, model, optimizer).applied
        same = [torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
        assert same == [True, True, False, False]


def test_unfreezing_a_prepared_parameter_raises():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        model, optimizer = in_training(strategy, model)
        model[0].requires_grad_(True)
        with pytest.raises(StrategyError, match=r"2 parameters of Sequential that were frozen .* \(0.weight first\)"):
            update(strategy, model, optimizer)


def test_a_call_that_is_refused_and_repeated_counts_its_micro_batch_once():
    with get_fake_strategy(train_batch_size=2, bf16=False) as strategy:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        model, optimizer = in_training(strategy, model)
        loss = model(torch.ones(3, 2)).sum().item()
        assert not update(strategy, model, optimizer).applied
        strategy.backward(model(torch.ones(3, 2)).sum(), model, optimizer)
        model[0].requires_grad_(True)
        with pytest.raises(StrategyError, match="were frozen when it was"):
            strategy.optimizer_step(optimizer, model)
        model[0].requires_grad_(False)
        assert strategy.optimizer_step(optimizer, model).loss == pytest.approx(loss)


def test_a_loss_of_another_model_is_refused_before_its_gradients_are_made():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        (actor, optimizer), (critic, _) = in_training(strategy), in_training(strategy)
        with pytest.raises(
            StrategyError, match="depends on a trainable parameter of Sequential, got one that does not"
        ):
            strategy.backward(critic(torch.ones(3, 2)).sum(), actor, optimizer)
        assert all(parameter.grad is None for parameter in critic.parameters())
        strategy.backward(actor(torch.ones(3, 2)).sum() + critic(torch.ones(3, 2)).sum(), actor, optimizer)


def test_a_loss_that_reaches_its_model_through_a_checkpointed_block_is_accepted():
    from torch.utils.checkpoint import checkpoint

    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        model, optimizer = in_training(strategy)
        inputs = torch.ones(3, 2, requires_grad=True)
        for reentrant in (True, False):
            strategy.backward(checkpoint(model, inputs, use_reentrant=reentrant).sum(), model, optimizer)


def test_swapped_and_missing_arguments_are_named():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        model, optimizer = in_training(strategy)
        loss = model(torch.ones(3, 2)).sum()
        with pytest.raises(ArgumentTypeError, match=r"expected the model to be a torch Module, got AdamW.*swapped"):
            strategy.backward(loss, optimizer, model)
        with pytest.raises(ArgumentTypeError, match="the optimizer to be a torch Optimizer, got NoneType"):
            strategy.optimizer_step(None, model)
        with pytest.raises(
            ArgumentTypeError, match="create_optimizer: expected the model to be a torch Module, got NoneType"
        ):
            strategy.create_optimizer(None)
        with pytest.raises(ArgumentTypeError, match="prepare: expected the optimizer to be a torch Optimizer, got str"):
            strategy.prepare((nn.Linear(2, 2), "adam", None))


@pytest.mark.parametrize("boundary", [1, "yes", torch.tensor(True)])
def test_a_boundary_is_a_bool(boundary):
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        model, optimizer = in_training(strategy)
        strategy.backward(model(torch.ones(3, 2)).sum(), model, optimizer)
        with pytest.raises(ArgumentTypeError, match="boundary"):
            strategy.optimizer_step(optimizer, model, boundary=boundary)


def test_a_scheduler_that_cannot_follow_updates_is_refused_before_anything_changes():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        (model, optimizer), (_, other) = in_training(strategy), in_training(strategy)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        schedulers = torch.optim.lr_scheduler
        for scheduler, words in [
            ("cosine", r"a scheduler with step\(\), got str \('cosine'"),
            (schedulers.ReduceLROnPlateau(optimizer), "steps by a metric"),
            (schedulers.ConstantLR(other), "a ConstantLR of another optimizer"),
        ]:
            with pytest.raises((ArgumentError, ArgumentTypeError, StrategyError), match=words):
                update(strategy, model, optimizer, scheduler)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_scheduler_that_was_prepared_and_is_never_passed_warns_once():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        model = nn.Linear(2, 2)
        optimizer = strategy.create_optimizer(model, lr=0.1)
        model, optimizer, _ = strategy.prepare((model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)))
        with pytest.warns(
            UserWarning, match=r"prepared with a scheduler \(ConstantLR\), which steps only if it is passed"
        ):
            update(strategy, model, optimizer)
        update(strategy, model, optimizer)


class SparseLookup(nn.Module):
    """Makes sparse gradients by a functional embedding, which preparing cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 2))

    def forward(self, indices):
        return nn.functional.embedding(indices, self.table, sparse=True).sum()


def test_a_sparse_gradient_is_refused_and_dropped():
    with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
        lookup = SparseLookup()
        model, optimizer, _ = strategy.prepare((lookup, strategy.create_optimizer(lookup, lr=0.1), None))
        strategy.backward(model(torch.tensor([1])), model, optimizer)
        with pytest.raises(
            UnsupportedOperationError, match="expected dense gradients of SparseLookup, got a sparse one"
        ):
            strategy.optimizer_step(optimizer, model)
        assert torch.equal(model.table, torch.ones(4, 2))
        with pytest.raises(StrategyError, match="expected a backward since the last update"):
            strategy.optimizer_step(optimizer, model)  # nothing is left of it
        strategy.backward(model.table.sum(), model, optimizer)
        assert strategy.optimizer_step(optimizer, model).loss == 8.0, "of the update that was not dropped"
