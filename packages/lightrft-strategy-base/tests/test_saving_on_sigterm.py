"""SIGTERM requests a stop, and a checkpoint at the end of the block."""

import os
import signal
import threading

import pytest
import torch
from checkpoint_models import in_training, update

from lightrft.config import (
    StrategyError,
)
from lightrft.strategy import FakeStrategy, get_fake_strategy


@pytest.fixture
def strategy():
    with get_fake_strategy(bf16=False, train_batch_size=1) as made:
        yield made


def test_sigterm_requests_a_stop_at_the_next_update_and_saves_on_exit_from_the_block(tmp_path):
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
