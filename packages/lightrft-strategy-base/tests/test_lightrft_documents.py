"""The code of LightRFT's own design document, on FakeStrategy; the first block after unpacking the triples."""

from argparse import Namespace

import pytest
import torch
from torch import nn

from lightrft.config import BackendNotInstalledError, StrategyConfig
from lightrft.strategy import FakeStrategy, get_fake_strategy, get_strategy
from lightrft.strategy.strategy import strategy_name


def test_basic_usage():
    args = Namespace(
        strategy="fake", bf16=False, train_batch_size=2, micro_train_batch_size=1, actor_learning_rate=1e-2
    )
    strategy = get_strategy(args)
    actor, critic, reward_models, initial_model = nn.Linear(2, 1), None, None, nn.Linear(2, 1)
    (actor, actor_optimizer, actor_scheduler), _, reward_models, initial_model = strategy.prepare_models_and_optimizers(
        actor, critic, reward_models, initial_model, args, 10
    )
    before = actor.weight.detach().clone()
    for batch in torch.ones(4, 1, 2):
        loss = actor(batch).mean()
        strategy.backward(loss, actor, actor_optimizer)
        strategy.optimizer_step(actor_optimizer, actor, actor_scheduler)
    assert not torch.equal(actor.weight, before)
    strategy.close()


def test_args_choose_the_strategy():
    assert strategy_name(StrategyConfig.from_args(Namespace(fsdp=True))) == "fsdp"
    assert strategy_name(StrategyConfig.from_args(Namespace())) == "deepspeed"


def test_configuration():
    args = Namespace(actor_learning_rate=3e-6, my_own=7)
    config = StrategyConfig.from_args(args)
    assert config.actor_learning_rate == 3e-6
    assert config.get_extra_arg("my_own", 1) == 7
    assert config.get_extra_arg("absent", 1) == 1


def test_configuration_driven_usage():
    config = StrategyConfig(
        seed=42, max_norm=1.0, micro_train_batch_size=4, train_batch_size=32, bf16=True, zero_stage=2
    )  # fmt: skip
    try:
        strategy = get_strategy(config)
    except BackendNotInstalledError as error:
        assert "pip install 'lightrft-deepspeed'" in str(error)
    else:
        assert strategy.accumulated_gradient == 8
        strategy.close()


def test_testing_with_fake_strategy():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.ones(2, 3)).mean()

    strategy = get_fake_strategy()
    strategy.setup_distributed()
    strategy.backward(loss, model, optimizer)
    result = strategy.optimizer_step(optimizer, model, None)
    assert not result.applied  # one micro-batch of 128
    strategy.close()


def test_the_constructor_of_lightrft():
    strategy = FakeStrategy(seed=7, max_norm=2.0, micro_train_batch_size=2, train_batch_size=8, args=None)
    assert (strategy.config.seed, strategy.accumulated_gradient) == (7, 4)
    strategy.close()
    with (
        pytest.warns(UserWarning, match="does not support"),
        FakeStrategy(args=Namespace(grad_accum_dtype="bf16")) as other,
    ):
        assert other.config.grad_accum_dtype is None
