"""The positions of loaders in checkpoints."""

import pytest
import torch
from torch import nn

from lightrft.config import CheckpointError
from lightrft.strategy import get_fake_strategy

PROMPTS, EXTRA = list(range(12)), list(range(100, 120))


@pytest.fixture
def strategy():
    with get_fake_strategy() as made:
        yield made


def loader(strategy, data=PROMPTS, batch_size=2, **settings):
    return strategy.setup_dataloader(data, batch_size, **settings)


def rest(loader):
    return [sample for batch in loader for sample in batch.tolist()]


def begun(strategy, folder, *loaders):
    """Save after another number of batches of each loader; what is left of each."""
    iterators = [iter(loader) for loader in loaders]
    for count, iterator in enumerate(iterators, 1):
        for _ in range(count):
            next(iterator)
    strategy.save_ckpt(nn.Linear(1, 1), folder)
    return [[sample for batch in iterator for sample in batch.tolist()] for iterator in iterators]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_loaders_resume_whether_created_before_or_after_loading(strategy, tmp_path, before):
    left = begun(strategy, tmp_path, loader(strategy), loader(strategy, EXTRA))
    with get_fake_strategy() as other:
        made = [loader(other, data) for data in (PROMPTS, EXTRA)[:before]]
        other.load_ckpt(nn.Linear(1, 1), tmp_path)
        made += [loader(other, data) for data in (PROMPTS, EXTRA)[before:]]
        assert [rest(loader) for loader in made] == left
        third = loader(other)
        assert sorted(rest(third)) == PROMPTS


def test_positions_not_yet_restored_are_saved_again(strategy, tmp_path):
    left = begun(strategy, tmp_path, loader(strategy), loader(strategy, EXTRA))
    for _ in range(2):
        with get_fake_strategy() as other:
            other.load_ckpt(nn.Linear(1, 1), tmp_path)
            first = loader(other)
            other.save_ckpt(nn.Linear(1, 1), tmp_path)
            assert [rest(first), rest(loader(other, EXTRA))] == left


def test_a_position_set_by_hand_overrides_the_loaded_one(strategy, tmp_path):
    begun(strategy, tmp_path, loader(strategy))
    with get_fake_strategy() as other:
        other.load_ckpt(nn.Linear(1, 1), tmp_path)
        assert loader(other, consumed_samples=6).consumed_samples == 6


OTHERS = [
    ({"data": EXTRA}, "samples=20", "samples=12"),
    ({"shuffle": False}, "shuffle=False, seed=None", "shuffle=True, seed=42"),
    ({"drop_last": False}, "drop_last=False", "drop_last=True"),
]


@pytest.mark.parametrize(("settings", "here", "there"), OTHERS)
@pytest.mark.parametrize("made_first", [True, False])
def test_the_position_of_another_loader_is_refused_by_name(strategy, tmp_path, settings, here, there, made_first):
    begun(strategy, tmp_path, loader(strategy))
    model = nn.Linear(1, 1)
    weight = model.weight.detach().clone()
    with get_fake_strategy() as other:
        wanted = rf"expected loader 0 .* to have {there}, .* got {here}"
        if made_first:
            made = loader(other, **settings)
            with pytest.raises(CheckpointError, match=wanted):
                other.load_ckpt(model, tmp_path)
            assert torch.equal(model.weight, weight)
            assert made.consumed_samples == 0
        else:
            other.load_ckpt(model, tmp_path)
            with pytest.raises(CheckpointError, match=wanted):
                loader(other, **settings)


@pytest.mark.parametrize("made_first", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_loader_resumes_with_another_batch_size(strategy, tmp_path, batch_size, made_first):
    data = list(range(24))
    [left] = begun(strategy, tmp_path, loader(strategy, data, batch_size=12))
    with get_fake_strategy() as other:
        if not made_first:
            other.load_ckpt(nn.Linear(1, 1), tmp_path)
        made = loader(other, data, batch_size=batch_size)
        if made_first:
            other.load_ckpt(nn.Linear(1, 1), tmp_path)
        assert [len(batch) for batch in made] == [batch_size] * (12 // batch_size)
        made.set_epoch(0, 12)
        assert rest(made) == left


def test_a_run_resumes_with_half_the_micro_batch_size(tmp_path):
    def trained(strategy, count, batch_size, load=False):
        torch.manual_seed(3)
        model = nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        strategy.prepare((model, optimizer, None))
        data = strategy.setup_dataloader(torch.arange(24.0).unsqueeze(1), batch_size)
        if load:
            strategy.load_ckpt(model, tmp_path)
        samples = []
        for batch in data:
            strategy.backward(model(batch).square().mean(), model, optimizer)
            samples += batch.flatten().tolist()
            if strategy.optimizer_step(optimizer, model).applied:
                count -= 1
                if not count:
                    break
        return model, optimizer, samples, data

    settings = {"bf16": False, "train_batch_size": 4}
    with get_fake_strategy(micro_train_batch_size=4, **settings) as strategy:
        wanted, state, samples, _ = trained(strategy, 5, 4)
    with get_fake_strategy(micro_train_batch_size=4, **settings) as strategy:
        model, *_kept = trained(strategy, 2, 4)
        strategy.save_ckpt(model, tmp_path)
    with get_fake_strategy(micro_train_batch_size=2, **settings) as strategy:
        model, optimizer, rest_of_samples, _ = trained(strategy, 3, 2, load=True)
    assert rest_of_samples == samples[8:]
    assert torch.allclose(model.weight, wanted.weight, rtol=1e-6)
    assert optimizer.state[model.weight]["step"] == state.state[wanted.weight]["step"] == 5


def test_another_seed_is_another_order(strategy, tmp_path):
    begun(strategy, tmp_path, loader(strategy))
    with get_fake_strategy(seed=7) as other:
        made = loader(other)
        with pytest.raises(CheckpointError, match=r"to have seed=42, .* got seed=7"):
            other.load_ckpt(nn.Linear(1, 1), tmp_path)
        assert made.consumed_samples == 0
