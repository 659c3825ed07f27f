"""The parts of training that can be looked at alone."""

import itertools
import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightrft.config import ArgumentError, ArgumentTypeError, StrategyError
from lightrft.strategy import get_fake_strategy
from lightrft.strategy.backend.adamw import parameter_groups, spared_from_decay
from lightrft.strategy.backend.modules import materialize
from lightrft.strategy.backend.types import GradientShards
from lightrft.strategy.data.loaders import ElasticSampler
from lightrft.strategy.models.modules import meta_copy
from lightrft.strategy.models.registry import inner_model
from lightrft.strategy.models.weight_stream import buckets_of
from lightrft.strategy.step.gradients import clip_factor, global_norm, scale
from lightrft.strategy.step.schedules import warmup_then_cosine


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.q_norm = nn.Linear(4, 4), nn.LayerNorm(4)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_f = nn.Linear(4, 4, bias=False)  # a norm by its name alone
        self.attention = Attention()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(4))


def test_biases_and_norms_are_spared_from_decay():
    assert spared_from_decay(Tied()) == {
        "ln_f.weight",
        "attention.q_proj.bias",
        "attention.q_norm.weight",
        "attention.q_norm.bias",
    }


def test_frozen_parameters_are_in_no_group_and_tied_ones_in_one():
    model = Tied()
    model.attention.q_proj.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [1, 3]


@pytest.mark.parametrize(
    ("norm", "limit", "factor"), [(2.0, 1.0, 0.5), (0.5, 1.0, 1.0), (9.0, None, 1.0), (9.0, 0.0, 1.0)]
)
def test_the_clip_factor(norm, limit, factor):
    assert math.isclose(clip_factor(norm, limit), factor, rel_tol=1e-5)


def test_a_norm_whose_square_exceeds_fp32_is_infinite():
    assert global_norm([GradientShards(tensors=[torch.full((2,), 1e30)])]).item() == math.inf
    assert math.isclose(
        global_norm([GradientShards(tensors=[torch.full((2,), 1e18)])]).item(), 2**0.5 * 1e18, rel_tol=1e-6
    )


def test_a_factor_of_one_leaves_every_bit():
    tensor = torch.tensor([0.1, math.nan])
    before = tensor.numpy().tobytes()
    scale([GradientShards(tensors=[tensor])], 1.0)
    assert tensor.numpy().tobytes() == before


def test_the_schedule_is_that_of_transformers():
    factor = warmup_then_cosine(2, 10)
    assert [factor(0), factor(1), factor(2)] == [0.0, 0.5, 1.0]
    assert math.isclose(factor(10), 0.1) and math.isclose(factor(6), 0.55)


@given(sizes=st.lists(st.integers(1, 100), max_size=20), limit=st.integers(1, 200))
def test_buckets_hold_everything_once_and_no_more_than_they_may(sizes, limit):
    by_name = {str(index): size for index, size in enumerate(sizes)}
    buckets = list(buckets_of(by_name, [[name] for name in by_name], limit))
    assert [name for bucket in buckets for name in bucket] == list(by_name)
    for bucket in buckets:
        assert len(bucket) == 1 or sum(by_name[name] for name in bucket) <= limit
    for left, right in itertools.pairwise(buckets):
        assert sum(by_name[name] for name in left) + by_name[right[0]] > limit


def test_a_meta_copy_holds_no_memory_and_keeps_ties():
    model = Tied()
    empty = meta_copy(model)
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    assert empty.head.weight is empty.embedding.weight
    materialize(empty, torch.device("cpu"))
    assert empty.head.weight is empty.embedding.weight
    assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])


class Backbone(nn.Module):
    """Like a Hugging Face model: it has a ``.model``, and is not a wrapper of it."""

    def __init__(self):
        super().__init__()
        self.model, self.is_actor = nn.Linear(2, 2), True

    @classmethod
    def from_pretrained(cls): ...


def test_a_hugging_face_model_is_no_wrapper_of_its_backbone():
    model = Backbone()
    assert inner_model(model) is model


def test_an_actor_with_parameters_outside_its_model_is_refused():
    actor = nn.Module()
    actor.model, actor.value_head, actor.is_actor = nn.Linear(2, 2), nn.Linear(2, 1), True
    with get_fake_strategy() as strategy, pytest.raises(StrategyError, match=r"inside its \.model.*value_head"):
        strategy.prepare((actor, strategy.create_optimizer(actor), None))


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 60), st.booleans())
def test_any_number_of_ranks_shares_what_is_left(length, ranks, consumed, drop_last):
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
    dealt = [share[index] for index in range(max(map(len, shares), default=0)) for share in shares]
    assert dealt[: len(left)] == left[: len(dealt)]
    assert len({len(share) for share in shares}) == 1
    assert len(dealt) == (len(left) - len(left) % ranks if drop_last else -(-len(left) // ranks) * ranks)


def test_a_position_outside_the_epoch_is_refused():
    with pytest.raises(ArgumentError, match=r"consumed_samples to be at most the 10 samples .* got 11"):
        ElasticSampler(10, rank=0, ranks=1, shuffle=False, seed=0, drop_last=False, consumed_samples=11)


def test_preparing_twice_for_other_ends_is_refused():
    with get_fake_strategy(bf16=False) as strategy:
        model = strategy.prepare(nn.Linear(2, 2))
        assert strategy.prepare(model) is model
        with pytest.raises(StrategyError, match="prepared for inference already"):
            strategy.prepare_model(model, is_training=True)


def test_an_offloaded_model_says_so_when_it_is_called():
    with get_fake_strategy(bf16=False) as strategy:
        model = strategy.prepare(nn.Linear(2, 2))
        strategy.offload_model(model)
        with pytest.raises(StrategyError, match="reload_model"):
            model(torch.ones(1, 2))
        strategy.reload_model(model)
        model(torch.ones(1, 2))


def test_a_closed_strategy_says_so_and_can_begin_again():
    strategy = get_fake_strategy()
    strategy.close()
    with pytest.raises(StrategyError, match="all_reduce: expected an open strategy, got one that was closed"):
        strategy.all_reduce(1.0)
    strategy.setup_distributed()
    assert strategy.all_reduce(1.0) == 1.0
    strategy.close()


def loader_of(strategy, length=10):
    return strategy.setup_dataloader(list(range(length)), batch_size=2, drop_last=False)


def test_the_loop_over_epochs_goes_on_where_a_loaded_position_stands():
    def seen(loader, epochs, until=None):
        found = []
        for epoch in range(loader.epoch, epochs):
            loader.set_epoch(epoch)
            for batch in loader:
                found += batch.tolist()
                if until is not None and len(found) >= until:
                    return found
        return found

    with get_fake_strategy() as strategy:
        whole = seen(loader_of(strategy), 3)
        assert len(whole) == 30
        assert len({tuple(whole[start : start + 10]) for start in (0, 10, 20)}) == 3
        for until in (6, 10, 14, 20):
            first, second = loader_of(strategy), loader_of(strategy)
            begun = seen(first, 3, until)
            second.load_state_dict(first.state_dict())
            assert begun + seen(second, 3) == whole


@pytest.mark.parametrize("position", [(1, -1), (1, 99), (-1, 0), (1.5, 0)])
def test_a_position_that_is_none_is_refused(position):
    with get_fake_strategy() as strategy, pytest.raises(ArgumentError, match="position of the loader: expected"):
        loader_of(strategy).set_epoch(*position)


def test_a_saved_position_that_lacks_a_part_is_refused():
    with (
        get_fake_strategy() as strategy,
        pytest.raises(ArgumentError, match=r"expected a position .* got one without consumed_samples"),
    ):
        loader_of(strategy).load_state_dict({"epoch": 1})


# What trains, and what does not


def in_training(strategy, model=None, optimizer=None):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5) if optimizer is None else optimizer
    return strategy.prepare((model, optimizer, None))[:2]


def update(strategy, model, optimizer, *arguments):
    strategy.backward(model(torch.ones(3, 2)).sum(), model, optimizer)
    return strategy.optimizer_step(optimizer, model, *arguments)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_frozen_in_an_optimizer_never_changes(when):
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


def test_what_was_frozen_cannot_begin_to_train_unnoticed():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        model, optimizer = in_training(strategy, model)
        model[0].requires_grad_(True)
        with pytest.raises(StrategyError, match=r"2 parameters of Sequential that were frozen .* \(0.weight first\)"):
            update(strategy, model, optimizer)


def test_a_loss_of_another_model_is_refused_before_its_gradients_are_made():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        (actor, optimizer), (critic, _) = in_training(strategy), in_training(strategy)
        with pytest.raises(
            StrategyError, match="depends on a trainable parameter of Sequential, got one that does not"
        ):
            strategy.backward(critic(torch.ones(3, 2)).sum(), actor, optimizer)
        assert all(parameter.grad is None for parameter in critic.parameters())
        strategy.backward(actor(torch.ones(3, 2)).sum() + critic(torch.ones(3, 2)).sum(), actor, optimizer)


def test_a_loss_that_reaches_its_model_through_a_checkpointed_block_is_taken():
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


def test_a_scheduler_that_cannot_follow_updates_is_refused_before_anything_moves():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        (model, optimizer), (_, other) = in_training(strategy), in_training(strategy)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        schedulers = torch.optim.lr_scheduler
        for scheduler, words in [
            ("cosine", r"a scheduler with step\(\), got .cosine"),
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


def test_lists_come_back_as_lists_and_named_tuples_as_such():
    class Pair(NamedTuple):
        left: Any
        right: Any

    with get_fake_strategy() as strategy:
        given = [nn.Linear(1, 1), None, None]
        assert strategy.prepare(given) == given
        pair = strategy.prepare(Pair(nn.Linear(1, 1), None))
        assert isinstance(pair, Pair) and pair.right is None
        assert not any(parameter.requires_grad for parameter in pair.left.parameters())


def test_settings_that_a_script_leaves_out_are_the_strategys():
    with get_fake_strategy(bf16=False, l2=0.3, adam_betas=(0.5, 0.6), critic_pretrain=True) as strategy:
        given = SimpleNamespace(actor_learning_rate=7e-3)
        (_, optimizer, _), (critic, other, _), _, _ = strategy.prepare_models_and_optimizers(
            nn.Linear(2, 2), nn.Linear(2, 1), None, None, given, 10
        )
        assert optimizer.param_groups[0]["initial_lr"] == 7e-3
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
        assert optimizer.param_groups[0]["weight_decay"] == 0.3
        assert critic is not None and other is not None


def averaged(strategy):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    strategy.prepare((model, optimizer, None))
    strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return model


def test_an_average_that_was_refused_did_not_move():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, other = averaged(strategy), strategy.prepare(nn.Sequential(nn.Linear(2, 1)))
        for _ in range(2):
            with pytest.raises(ArgumentError, match="the average has no weight"):
                strategy.moving_average(model, other)


def test_an_average_inherits_nothing_from_one_that_is_gone():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        averages = strategy._averages
        for _ in range(20):  # memory is used again, and so is its address
            average = nn.Linear(2, 1)
            assert average not in averages.seen
            averages.seen[average] = 1
            del average
