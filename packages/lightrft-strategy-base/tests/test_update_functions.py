"""The pure functions of an update: parameter groups, norm, clipping, schedule, and buckets."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tied_model import Tied
from torch import nn

from lightrft.strategy.backend.adamw import names_without_decay, parameter_groups
from lightrft.strategy.backend.types import GradientShards
from lightrft.strategy.models.weight_stream import buckets_of
from lightrft.strategy.step.gradients import clip_factor, global_norm, scale
from lightrft.strategy.step.schedules import warmup_then_cosine


def test_biases_and_norms_do_not_decay():
    assert names_without_decay(Tied()) == {
        "ln_f.weight",
        "attention.q_proj.bias",
        "attention.q_norm.weight",
        "attention.q_norm.bias",
    }


class ScaleRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))


class NormalHead(nn.Linear):
    pass


class PolicyWithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.ones(2, 2))
        self.first = ScaleRMSNorm()
        self.head = NormalHead(2, 2)


def test_a_class_whose_name_has_norm_in_it_is_not_always_a_norm():
    assert names_without_decay(PolicyWithNorm()) == {"first.scale", "head.bias"}


def test_frozen_parameters_are_in_no_group_and_tied_ones_in_one():
    model = Tied()
    model.attention.q_proj.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [1, 3]


@pytest.mark.parametrize(
    ("norm", "limit", "factor"), [(2.0, 1.0, 0.5), (0.5, 1.0, 1.0), (9.0, None, 1.0), (9.0, 0.0, 1.0)]
)
def test_the_clip_factor_scales_down_norms_above_the_limit(norm, limit, factor):
    assert math.isclose(clip_factor(norm, limit), factor, rel_tol=1e-5)


def test_a_norm_whose_square_exceeds_fp32_is_infinite():
    assert global_norm([GradientShards(tensors=[torch.full((2,), 1e30)])]).item() == math.inf
    assert math.isclose(
        global_norm([GradientShards(tensors=[torch.full((2,), 1e18)])]).item(), 2**0.5 * 1e18, rel_tol=1e-6
    )


def test_scaling_by_one_changes_no_bit():
    tensor = torch.tensor([0.1, math.nan])
    before = tensor.numpy().tobytes()
    scale([GradientShards(tensors=[tensor])], 1.0)
    assert tensor.numpy().tobytes() == before


def test_the_schedule_warms_up_linearly_and_decays_to_its_floor():
    factor = warmup_then_cosine(2, 10)
    assert [factor(0), factor(1), factor(2)] == [0.0, 0.5, 1.0]
    assert math.isclose(factor(10), 0.1) and math.isclose(factor(6), 0.55)


@given(sizes=st.lists(st.integers(1, 100), max_size=20), limit=st.integers(1, 200))
def test_buckets_contain_each_tensor_once_within_their_limit(sizes, limit):
    by_name = {str(index): size for index, size in enumerate(sizes)}
    buckets = list(buckets_of(by_name, [[name] for name in by_name], limit))
    assert [name for bucket in buckets for name in bucket] == list(by_name)
    for bucket in buckets:
        assert len(bucket) == 1 or sum(by_name[name] for name in bucket) <= limit
    for left, right in itertools.pairwise(buckets):
        assert sum(by_name[name] for name in left) + by_name[right[0]] > limit
