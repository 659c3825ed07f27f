"""The share of a rank, and the position of a loader."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft.config import ArgumentError
from lightrft.strategy import get_fake_strategy
from lightrft.strategy.data.loaders import ElasticSampler


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 60), st.booleans())
def test_any_number_of_ranks_shares_the_remaining_samples(length, ranks, consumed, drop_last):
    consumed = min(consumed, length)
    shares = [
        list(
            ElasticSampler(
                length, rank=rank, ranks=ranks, shuffle=True, seed=1, drop_last=drop_last, consumed_samples=consumed
            )
        )
        for rank in range(ranks)
    ]
    left = ElasticSampler(length, rank=0, ranks=1, shuffle=True, seed=1, drop_last=False).order()[consumed:]
    in_order = [share[index] for index in range(max(map(len, shares), default=0)) for share in shares]
    assert in_order[: len(left)] == left[: len(in_order)]
    assert len({len(share) for share in shares}) == 1
    assert len(in_order) == (len(left) - len(left) % ranks if drop_last else -(-len(left) // ranks) * ranks)


def test_a_position_outside_the_epoch_is_refused():
    with pytest.raises(ArgumentError, match=r"consumed_samples to be at most the 10 samples .* got 11"):
        ElasticSampler(10, rank=0, ranks=1, shuffle=False, seed=0, drop_last=False, consumed_samples=11)


def loader_of(strategy, length=10, **settings):
    return strategy.setup_dataloader(list(range(length)), batch_size=2, drop_last=False, **settings)


def test_the_loop_over_epochs_continues_at_a_loaded_position():
    def seen(loader, epochs, until=None):
        got = []
        for epoch in range(loader.epoch, epochs):
            loader.set_epoch(epoch)
            for batch in loader:
                got += batch.tolist()
                if until is not None and len(got) >= until:
                    return got
        return got

    with get_fake_strategy() as strategy:
        samples = seen(loader_of(strategy), 3)
        assert len(samples) == 30
        assert len({tuple(samples[start : start + 10]) for start in (0, 10, 20)}) == 3
        for until in (6, 10, 14, 20):
            first, second = loader_of(strategy), loader_of(strategy)
            begun = seen(first, 3, until)
            second.load_state_dict(first.state_dict())
            assert begun + seen(second, 3) == samples


@pytest.mark.parametrize("position", [(1, -1), (1, 99), (-1, 0), (1.5, 0)])
def test_an_invalid_position_is_refused(position):
    with get_fake_strategy() as strategy:
        loader = loader_of(strategy)
        with pytest.raises(ArgumentError, match=r"^set_epoch: expected"):
            loader.set_epoch(*position)
        with pytest.raises(ArgumentError, match=r"^load_state_dict: expected"):
            loader.load_state_dict(dict(zip(("epoch", "consumed_samples"), position, strict=True)))


def test_an_invalid_position_to_start_from_is_refused():
    with get_fake_strategy() as strategy, pytest.raises(ArgumentError, match=r"^setup_dataloader: expected"):
        loader_of(strategy, consumed_samples=-1)


def test_a_saved_position_that_lacks_a_part_is_refused():
    with (
        get_fake_strategy() as strategy,
        pytest.raises(ArgumentError, match=r"expected a position .* got one without consumed_samples"),
    ):
        loader_of(strategy).load_state_dict({"epoch": 1})
