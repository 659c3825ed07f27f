"""The parts of training that can be looked at alone."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightrft.config import ArgumentError, StrategyError
from lightrft.strategy import get_fake_strategy
from lightrft.strategy.rollout.weights import buckets_of
from lightrft.strategy.training.data import ElasticSampler
from lightrft.strategy.training.gradients import GradientShards, clip_factor, global_norm, scale
from lightrft.strategy.training.modules import inner_model, materialize, skeleton
from lightrft.strategy.training.optimizers import parameter_groups, spared_from_decay
from lightrft.strategy.training.schedules import warmup_then_cosine


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


def test_a_skeleton_holds_no_memory_and_keeps_ties():
    model = Tied()
    empty = skeleton(model)
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
    with get_fake_strategy() as strategy, pytest.raises(StrategyError, match=r"outside its \.model.*value_head"):
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
    with pytest.raises(ArgumentError, match="consumed_samples=11 is not within the 10 samples"):
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
    with pytest.raises(StrategyError, match="all_reduce: this strategy was closed"):
        strategy.all_reduce(1.0)
    strategy.setup_distributed()
    assert strategy.all_reduce(1.0) == 1.0
    strategy.close()
