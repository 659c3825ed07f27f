"""Losses that are sums over items: what counts as a denominator, what is refused, and what it costs."""

import math
from typing import Any

import denominator_cases as cases
import numpy as np
import pytest
import torch
from workers import Workers

from lightrft.config import ArgumentError, ArgumentTypeError, StrategyError
from lightrft.strategy import StrategyBase, get_fake_strategy
from lightrft.strategy.distributed.world import World
from lightrft.strategy.step import denominators
from lightrft.strategy.step.denominators import PendingTotals, Totals

ALONE = World.alone(get_fake_strategy(device="cpu").config)


@pytest.fixture
def strategy():
    with get_fake_strategy(device="cpu", bf16=False, max_norm=None, train_batch_size=2) as made:
        yield made


def backward(strategy: StrategyBase, model, optimizer, rows: int, **more: object) -> None:
    strategy.backward(model(torch.ones(rows, 2)).sum(), model, optimizer, **more)


@pytest.mark.parametrize(
    "four",
    [4, 4.0, np.int64(4), np.float32(4), torch.tensor(4), torch.tensor([4.0]), torch.tensor(4, dtype=torch.uint8)],
)
def test_a_number_in_any_form_is_a_denominator(strategy, four):
    model, optimizer = cases.prepared(strategy)
    backward(strategy, model, optimizer, 3, denominator=four)
    strategy.optimizer_step(optimizer, model)
    backward(strategy, model, optimizer, 1, denominator=0)
    result = strategy.optimizer_step(optimizer, model)
    assert result.denominator == 4.0
    assert result.grad_norm == pytest.approx(math.sqrt(2))
    assert model.weight.tolist() == [[-0.5, -0.5]]  # 0.5 - (3 + 1) / 4


@pytest.mark.parametrize(
    "value", [True, "4", [4], torch.ones(2), torch.ones(0), torch.tensor(True), torch.tensor(1j), 1j, float]
)
def test_what_is_not_a_number_is_refused_and_changes_nothing(strategy, value):
    model, optimizer = cases.prepared(strategy)
    backward(strategy, model, optimizer, 3, denominator=3)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^backward: expected denominator to be a number"):
        backward(strategy, model, optimizer, 3, denominator=value)
    strategy.optimizer_step(optimizer, model, boundary=True)
    assert model.weight.tolist() == [[-0.5, -0.5]]


def test_a_tensor_may_change_after_backward(strategy):
    model, optimizer = cases.prepared(strategy)
    items = torch.tensor(2.0)
    backward(strategy, model, optimizer, 2, denominator=items)
    items.zero_()
    assert strategy.optimizer_step(optimizer, model, boundary=True).denominator == 2.0


@pytest.mark.parametrize("value", [-1, -1e-30, math.nan, math.inf, 10**400])
def test_an_invalid_denominator_drops_the_update(strategy, value):
    model, optimizer = cases.prepared(strategy)
    backward(strategy, model, optimizer, 5, denominator=1)
    with pytest.raises(
        ArgumentError, match=r"backward: expected each denominator to be one number.* in backward 2 of the update"
    ):
        backward(strategy, model, optimizer, 5, denominator=value)
    assert all(parameter.grad is None for parameter in model.parameters())
    backward(strategy, model, optimizer, 2, denominator=2)
    strategy.optimizer_step(optimizer, model, boundary=True)
    assert model.weight.tolist() == [[-0.5, -0.5]]


@pytest.mark.parametrize(("first", "second"), [(2, None), (None, 2)])
def test_some_losses_without_a_denominator_drop_the_update(strategy, first, second):
    model, optimizer = cases.prepared(strategy)
    backward(strategy, model, optimizer, 5, denominator=first)
    with pytest.raises(StrategyError, match="or with none, got 1 with and 1 without"):
        backward(strategy, model, optimizer, 5, denominator=second)
    backward(strategy, model, optimizer, 2, denominator=2)
    strategy.optimizer_step(optimizer, model, boundary=True)
    assert model.weight.tolist() == [[-0.5, -0.5]]


def test_two_models_have_their_own_denominators(strategy):
    pairs = [cases.prepared(strategy) for _ in range(2)]
    for (model, optimizer), items in zip(pairs, (3, None), strict=True):
        backward(strategy, model, optimizer, 3, denominator=items)
    results = [strategy.optimizer_step(optimizer, model, boundary=True) for model, optimizer in pairs]
    assert [result.denominator for result in results] == [3.0, None]
    assert [result.grad_norm for result in results] == pytest.approx([math.sqrt(2), 3 * math.sqrt(2)])


def test_losses_of_one_graph_have_their_own_denominators(strategy):
    model, optimizer = cases.prepared(strategy)
    loss = model(torch.ones(1, 2)).sum()
    strategy.backward(loss, model, optimizer, denominator=1, retain_graph=True)
    strategy.backward(3 * loss, model, optimizer, denominator=3)
    assert strategy.optimizer_step(optimizer, model, boundary=True).denominator == 4.0
    assert model.weight.tolist() == [[-0.5, -0.5]]


def test_totals_of_values_on_the_device_and_on_the_host():
    big = torch.tensor(2.0**52, dtype=torch.float64)
    totals = PendingTotals([big, big, 1.0 - 2.0], ALONE).read()
    assert totals == Totals(items=2.0**53 - 1, with_denominator=3, without_denominator=0, invalid=1)
    totals, norm = PendingTotals([big, -big, big / 0, None], ALONE).read_with(torch.tensor(0.1))
    assert (totals.with_denominator, totals.without_denominator, totals.invalid) == (3, 1, 2)
    assert norm == torch.tensor(0.1).item()


@pytest.mark.parametrize("items", [[2.0, 2.0], [torch.tensor(2.0, dtype=torch.float64)] * 2])
def test_losses_of_ranks_that_share_sequences_count_once(items):
    losses = [torch.tensor(value, dtype=torch.float64) for value in (3.0, 5.0)]
    pending = PendingTotals(items, ALONE, sharing=2, losses=losses)  # as if it were the sum of both ranks
    totals, _ = pending.read_with(torch.tensor(1.0))
    assert (totals.items, pending.losses()) == (2.0, 4.0)
    assert totals.mean_of(pending.losses(), 8) == 2.0


def test_one_process_reads_the_losses_together_with_the_norm():
    pending = PendingTotals([None], ALONE, losses=[torch.tensor(3.0, dtype=torch.float64)])
    totals, norm = pending.read_with(torch.tensor(0.1))
    assert isinstance(pending._losses, float), "later it would wait for the optimizer"
    assert (totals.denominator, norm, pending.losses()) == (None, torch.tensor(0.1).item(), 3.0)


def test_the_loss_of_an_update_without_denominators_is_a_mean():
    assert Totals(items=0.0, with_denominator=0, without_denominator=2, invalid=0).mean_of(4.0, 8) == 0.5
    assert Totals(items=0.0, with_denominator=2, without_denominator=0, invalid=0).mean_of(4.0, 8) is None


@pytest.mark.parametrize(
    ("totals", "factor"),
    [
        (Totals(items=8.0, with_denominator=2, without_denominator=0, invalid=0), 0.5),
        (Totals(items=0.0, with_denominator=0, without_denominator=2, invalid=0), 1.5),
        (Totals(items=0.0, with_denominator=2, without_denominator=0, invalid=0), None),
        (Totals(items=8.0, with_denominator=2, without_denominator=1, invalid=0), None),
        (Totals(items=8.0, with_denominator=2, without_denominator=0, invalid=1), None),
    ],
)
def test_the_factor_of_an_update(totals, factor):
    got = totals.factor(ranks=4, without=1.5)
    assert got == factor or (factor is None and math.isnan(got))


@pytest.mark.parametrize("sharing", [1, 2, 3, 4])
@pytest.mark.parametrize("changes", [{}, {0: 1.0}, {2: 1.0}, {5: 3.0}, {0: 2.0, 2: -1.0}, {0: 1.0, 1: -1.0, 2: 1.0}])
@pytest.mark.parametrize("count", [100.0, 1 / 3, 1e10])
def test_denominators_of_ranks_that_share_sequences_are_compared_by_a_sum(sharing, changes, count):
    counts = [count + rank // sharing + changes.get(rank, 0.0) for rank in range(max(6, 3 * sharing))]
    groups = [counts[first : first + sharing] for first in range(0, len(counts) - sharing + 1, sharing)]
    counts = [each for group in groups for each in group]
    difference = sum(denominators._weight(rank, sharing) * each for rank, each in enumerate(counts))
    assert (abs(difference) > denominators.ROUNDING * sum(counts)) == any(len(set(group)) > 1 for group in groups)


def test_a_denominator_with_a_graph_is_detached(strategy, recwarn):
    model, optimizer = cases.prepared(strategy)
    strategy.backward(
        model(torch.ones(1, 2)).sum(), model, optimizer, denominator=torch.tensor(2.0, requires_grad=True)
    )
    assert strategy.optimizer_step(optimizer, model, boundary=True).denominator == 2.0
    assert not list(recwarn)


def test_a_denominator_without_a_value_is_refused(strategy):
    model, optimizer = cases.prepared(strategy)
    with pytest.raises(ArgumentError, match="a tensor of one number, or None"):
        strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer, denominator=torch.ones((), device="meta"))


def test_the_error_names_the_ranks_and_the_first_invalid_values():
    of_0 = denominators.report([1.0, -2.0, math.nan, -1.0, -4.0])
    of_1 = denominators.report([1.0, None])
    assert of_0 == ["-2 in backward 2, nan in backward 3, -1 in backward 4", "5 with and 0 without", "nan"]
    assert "got rank 0: -2 in backward 2" in str(denominators.invalid_update_error("optimizer_step", "M", [of_0, of_1]))
    mixed = str(denominators.invalid_update_error("optimizer_step", "M", [["", "1 with and 0 without", "1"], of_1]))
    assert "got rank 0: 1 with and 0 without; rank 1: 1 with and 1 without" in mixed


def test_an_update_sums_one_vector_besides_the_gradient(two: Workers) -> None:
    for denominator in (None, 3):
        assert two.run(cases.collectives_of_an_update, denominator=denominator) == [[(6, True), (2, False)]] * 2


@pytest.mark.parametrize(("others", "mine"), [(3, None), (None, 3), (3, -1), (3, math.inf), (3, "many"), (3, True)])
def test_one_rank_alone_makes_all_raise(two: Workers, others: float | None, mine: Any) -> None:
    (message, weights), other = two.run(cases.errors_of_unequal_ranks, others=others, mine=mine, rank=1)
    assert other == (message, weights)
    assert "Error: optimizer_step: expected" in message
    assert "rank 1: " in message
    assert weights == [-0.5, -0.5]
