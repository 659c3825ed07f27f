"""An epoch of a training loader is made of whole updates, at any number of ranks."""

import logging

import epochs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.config import ArgumentError
from lightrft.strategy import get_fake_strategy
from lightrft.strategy.data.loaders import ElasticSampler


@pytest.fixture
def strategy():
    with get_fake_strategy(train_batch_size=12, micro_train_batch_size=3) as made:
        yield made


def lengths(loader):
    return [len(batch) for batch in loader]


@pytest.mark.parametrize("micro", [1, 3, 12])
def test_one_process_makes_the_updates_of_plain_torch(tmp_path, micro):
    epochs.require_plain(epochs.losses("fake", tmp_path, micro))


def test_an_epoch_resumes_with_other_micro_batches(tmp_path):
    epochs.losses("fake", tmp_path, micro=2, save_after=4)
    epochs.require_plain(epochs.losses("fake", tmp_path, micro=6, resume=True), skipped=4)


@given(
    samples=st.integers(1, 80), update=st.integers(1, 6), consumed=st.integers(0, 80), drop_last=st.booleans(),
    seed=st.integers(0, 3),
)  # fmt: skip
def test_each_update_has_the_same_samples_at_any_number_of_ranks(samples, update, consumed, drop_last, seed):
    total, consumed = 12 * update, min(consumed, samples)

    def updates(ranks):
        shares = []
        for rank in range(ranks):
            sampler = ElasticSampler(
                samples, rank=rank, ranks=ranks, shuffle=True, seed=seed, drop_last=drop_last,
                consumed_samples=consumed, multiple=total,
            )  # fmt: skip
            shares.append(list(sampler))
            assert len(shares[-1]) == len(sampler)
        per_rank = total // ranks
        number = len(shares[0]) // per_rank
        assert [len(share) for share in shares] == [number * per_rank] * ranks
        return [
            sorted(sample for share in shares for sample in share[index * per_rank : (index + 1) * per_rank])
            for index in range(number)
        ]

    alone = updates(1)
    assert all(updates(ranks) == alone for ranks in (2, 3, 4))
    left = samples - consumed
    assert len(alone) == (left // total if drop_last else -(-left // total))


@pytest.mark.parametrize(("options", "batches"), [
    ({"samples": 72}, 24), ({"whole_updates": False}, 25), ({"shuffle": False}, 25), ({"whole_updates": True}, 24),
    ({"shuffle": False, "whole_updates": True}, 24), ({"drop_last": False, "whole_updates": True}, 28), ({"batch_size": 4}, 19),
    ({"whole_updates": True, "consumed_samples": 20}, 16),
])  # fmt: skip
def test_which_loaders_end_with_a_whole_update(strategy, options, batches, caplog):
    options = {"samples": 76, "batch_size": 3, **options}
    loader = strategy.setup_dataloader(list(range(options.pop("samples"))), **options)
    assert lengths(loader) == [loader.batch_size] * batches
    assert not caplog.records


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_batches_of_another_size_make_whole_updates_with_a_boundary(strategy, size, drop_last, caplog):
    model = torch.nn.Linear(1, 1)
    model, optimizer, _ = strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1), None))
    data = torch.arange(76.0).unsqueeze(1)
    loader = strategy.setup_dataloader(data, size, drop_last=drop_last, whole_updates=True)
    assert f"True after every {12 // size} batches" in caplog.text
    assert f"which are {4 * size} samples" in caplog.text
    updates, pending = [], 0
    for _ in range(2):
        for number, batch in enumerate(loader, 1):
            pending += len(batch)
            strategy.backward(model(batch).mean(), model, optimizer)
            if strategy.optimizer_step(optimizer, model, boundary=number % (12 // size) == 0).applied:
                updates.append(pending)
                pending = 0
        assert pending == 0
    assert updates == [12] * (12 if drop_last else 14)


@pytest.mark.parametrize(("samples", "total", "dropped"), [(255, 128, 127), (76, 12, 4)])
def test_a_training_loader_says_what_it_drops(samples, total, dropped, caplog):
    with get_fake_strategy(train_batch_size=total, micro_train_batch_size=1) as made:
        loader = made.setup_dataloader(list(range(samples)), 1)
        assert len(loader) == samples - dropped
    assert len(caplog.records) == 1
    assert f"each epoch drops {dropped} of {samples} samples" in caplog.text
    assert "whole_updates=False" in caplog.text


def test_the_next_epoch_of_a_resumed_one_is_complete(strategy):
    loader = strategy.setup_dataloader(list(range(76)), 3, consumed_samples=72)
    assert [lengths(loader) for _ in range(2)] == [[], [3] * 24]


@pytest.mark.parametrize(("samples", "options", "remedy"), [
    (76, {"drop_last": False}, "Pass drop_last=True to drop them, whole_updates=True to repeat"),
    (11, {}, "Pass a train_batch_size of at most 11, whole_updates=True with drop_last=False"),
    (5, {"drop_last": False}, "Pass a train_batch_size of at most 5, whole_updates=True with drop_last=False"),
])  # fmt: skip
def test_a_training_loader_with_micro_batches_left_warns_once(strategy, samples, options, remedy, caplog):
    loader = strategy.setup_dataloader(list(range(samples)), 3, **options)
    assert len(loader) == (-(-samples // 3) if options else samples // 3)
    list(loader)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{samples} samples" in record.getMessage()
    assert remedy in record.getMessage()


@pytest.mark.parametrize("options", [{"whole_updates": False}, {"shuffle": False}])
def test_a_loader_that_is_not_for_training_does_not_warn(strategy, options, caplog):
    strategy.setup_dataloader(list(range(11)), 3, drop_last=False, **options)
    assert not caplog.records


@pytest.mark.parametrize(("options", "message"), [
    ({"replay_buffer": range(11)}, "at least train_batch_size=12 samples, .* got 11"),
    ({"batch_size": 5}, "batch_size to divide the 12 samples of an update on one rank, .* got 5"),
    ({"sampler": range(76)}, "expected whole_updates or sampler, got both"),
])  # fmt: skip
def test_whole_updates_that_cannot_be_are_refused(strategy, options, message):
    with pytest.raises(ArgumentError, match=message):
        strategy.setup_dataloader(**{"replay_buffer": range(76), "batch_size": 3, "whole_updates": True, **options})
