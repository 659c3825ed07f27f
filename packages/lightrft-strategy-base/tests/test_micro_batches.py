"""Plans of micro-batches, compared with the best of all divisions for small inputs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.strategy import FakeStrategy, MicroBatch
from lightrft.strategy.data.micro_batches import Planner

BUDGET = 12
LENGTHS = st.lists(st.integers(1, BUDGET), max_size=7)


def divisions(items):
    """Every way to divide ``items`` into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in divisions(rest):
        yield [[first], *groups]
        for at, group in enumerate(groups):
            yield [*groups[:at], [first, *group], *groups[at + 1 :]]


def cost(group, padded):
    return len(group) * max(group) if padded else sum(group)


def best(lengths, padded):
    """By number of groups, the smallest possible cost of the most costly one."""
    smallest = {}
    for groups in divisions(lengths):
        largest = max((cost(group, padded) for group in groups), default=0)
        smallest[len(groups)] = min(largest, smallest.get(len(groups), largest))
    return smallest


def planned(lengths, padded, more=0, budget=BUDGET):
    planner = Planner(lengths, budget, padded=padded)
    return planner.plan(planner.fewest + more)


@given(LENGTHS, st.booleans(), st.integers(0, 4))
def test_each_sequence_is_in_one_micro_batch_within_the_budget(lengths, padded, more):
    plan = planned(lengths, padded, more)
    assert sorted(index for micro_batch in plan for index in micro_batch.indices) == list(range(len(lengths)))
    for micro_batch in plan:
        group = [lengths[index] for index in micro_batch.indices]
        assert micro_batch.tokens == (cost(group, padded) if group else 0) <= BUDGET


@given(LENGTHS, st.booleans(), st.integers(0, 4))
def test_fillers_come_last_and_only_if_there_are_fewer_sequences_than_micro_batches(lengths, padded, more):
    plan = planned(lengths, padded, more)
    assert [micro_batch.weight for micro_batch in plan].count(0) == max(0, len(plan) - len(lengths))
    assert [micro_batch.tokens for micro_batch in plan] == sorted(
        (micro_batch.tokens for micro_batch in plan), reverse=True
    )
    assert [micro_batch.last for micro_batch in plan] == [False] * (len(plan) - 1) + [True] * bool(plan)


@given(LENGTHS)
def test_padded_needs_the_fewest_micro_batches_and_makes_the_costliest_as_small_as_possible(lengths):
    possible = best(lengths, padded=True)
    assert len(planned(lengths, True)) == min(number for number, largest in possible.items() if largest <= BUDGET)
    for more in range(3):
        plan = planned(lengths, True, more)
        smallest = min(largest for number, largest in possible.items() if number <= len(plan))
        assert max((micro_batch.tokens for micro_batch in plan), default=0) == smallest


@given(LENGTHS)
def test_packed_plans_are_within_the_bound_of_the_optimum(lengths):
    possible = best(lengths, padded=False)
    fewest = min(number for number, largest in possible.items() if largest <= BUDGET)
    assert fewest <= len(planned(lengths, False)) <= 11 / 9 * fewest + 6 / 9
    for more in range(3):
        plan = planned(lengths, False, more)
        smallest = min(largest for number, largest in possible.items() if number <= len(plan))
        assert max((micro_batch.tokens for micro_batch in plan), default=0) <= 4 / 3 * smallest


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(50, 200))
def test_first_fit_decreasing_is_the_one_of_the_textbook(lengths, budget):
    sums = []
    for length in sorted(lengths, reverse=True):
        at = next((at for at, filled in enumerate(sums) if filled + length <= budget), len(sums))
        sums[at : at + 1] = [sums[at] + length if at < len(sums) else length]
    assert Planner(lengths, budget, padded=False).fewest == len(sums)


def test_a_padded_plan_has_similar_lengths_together_and_the_costly_first():
    assert planned([3, 9, 4, 5], padded=True, budget=10) == (
        MicroBatch((1,), 9, False), MicroBatch((2, 0), 8, False), MicroBatch((3,), 5, True),
    )  # fmt: skip


def test_packed_sums_are_even():
    assert [micro_batch.tokens for micro_batch in planned([2] * 8, padded=False)] == [
        8,
        8,
    ]  # first-fit decreasing: 12 and 4


def test_packed_falls_back_to_first_fit_decreasing():
    lengths = [6, 6, 4, 4, 4]  # the longest first into the emptiest: 14 and 10
    plan = planned(lengths, padded=False)
    assert [[lengths[index] for index in micro_batch.indices] for micro_batch in plan] == [[6, 6], [4, 4, 4]]


@pytest.fixture(scope="module")
def strategy():
    with FakeStrategy(bf16=False, train_batch_size=1) as made:
        yield made


@pytest.mark.parametrize(
    "lengths",
    [(3, 1, 2), [np.int64(3), np.int32(1), 2], np.array([3, 1, 2]), np.array([3, 1, 2], np.uint8), torch.tensor([3, 1, 2])],
)  # fmt: skip
def test_lengths_may_be_a_list_a_tuple_a_tensor_or_an_array(strategy, lengths):
    plan = strategy.plan_micro_batches(lengths, max_tokens=np.int64(4), padded=np.bool_(False))
    assert plan == strategy.plan_micro_batches([3, 1, 2], max_tokens=4, padded=False)
    assert {type(micro_batch.tokens) for micro_batch in plan} == {int}


@pytest.mark.parametrize("lengths", [[], (), torch.tensor([], dtype=torch.int64), np.array([], dtype=int)])
def test_no_sequences_make_no_micro_batches(strategy, lengths):
    assert strategy.plan_micro_batches(lengths, max_tokens=4, padded=True) == ()


@pytest.mark.parametrize("padded", [True, False])
def test_a_budget_has_no_limit(strategy, padded):
    assert len(strategy.plan_micro_batches([3, 1, 2], max_tokens=2**70, padded=padded)) == 1


def test_a_sequence_over_the_budget_is_refused_with_its_index_and_the_budget_it_needs(strategy):
    with pytest.raises(ArgumentError, match=r"max_tokens=8, got one of 9 tokens at index 1\. .* at least 11"):
        strategy.plan_micro_batches([8, 9, 11], max_tokens=8, padded=True)


def test_empty_sequences_are_refused(strategy):
    with pytest.raises(ArgumentError, match=r"at least 1 token, got 0 at index 1"):
        strategy.plan_micro_batches([8, 0], max_tokens=8, padded=True)


def test_lengths_that_are_not_integers_are_refused_by_index(strategy):
    with pytest.raises(ArgumentTypeError, match=r"plan_micro_batches: .* integers, got float \(2\.5\) at index 1"):
        strategy.plan_micro_batches([8, 2.5], max_tokens=8, padded=True)
