"""The parts of training that can be looked at alone."""

import itertools
import math
import threading
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

from lightrft.config import ArgumentError, ArgumentTypeError, StrategyError, UnsupportedOperationError
from lightrft.strategy import FakeStrategy, get_fake_strategy
from lightrft.strategy.backend.adamw import parameter_groups, spared_from_decay
from lightrft.strategy.backend.modules import materialize
from lightrft.strategy.backend.types import GradientShards
from lightrft.strategy.data.loaders import ElasticSampler
from lightrft.strategy.models.meta import weights_on_rank_0
from lightrft.strategy.models.modules import check_attributes, meta_copy
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
def test_buckets_contain_each_tensor_once_within_their_limit(sizes, limit):
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


class TwoHeads(nn.Module):
    """A model on a backbone that others may share."""

    def __init__(self, backbone=None):
        super().__init__()
        self.backbone, self.head = backbone or nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.backbone(inputs))


def with_a_module_of(model):
    return TwoHeads(model.backbone)


def with_a_parameter_of(model):
    other = TwoHeads()
    other.head.weight = model.head.weight
    return other


def with_memory_of(model):
    other = TwoHeads()
    other.head.weight = nn.Parameter(model.head.weight.detach()[:])
    return other


def with_part_of_the_memory_of(model):
    other = TwoHeads()
    other.head.bias = nn.Parameter(model.backbone.bias.detach()[1:3])
    return other


SHARING = [with_a_module_of, with_a_parameter_of, with_memory_of, with_part_of_the_memory_of]


@pytest.mark.parametrize("build", SHARING)
@pytest.mark.parametrize("trains", [True, False])
def test_a_model_that_shares_parameters_with_a_prepared_one_is_refused(build, trains):
    with get_fake_strategy(bf16=False) as strategy:
        actor = TwoHeads()
        critic = build(actor)
        optimizer = strategy.create_optimizer(critic)
        strategy.prepare((actor, strategy.create_optimizer(actor), None))
        with pytest.raises(StrategyError, match=r"prepare: .*shares \d with TwoHeads \((backbone|head)\.\w+ first\)"):
            strategy.prepare((critic, optimizer, None) if trains else critic)


def test_a_model_that_shares_parameters_is_not_adopted():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        actor = TwoHeads()
        critic = TwoHeads(actor.backbone)
        for model in (actor, critic):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with nullcontext() if model is actor else pytest.raises(StrategyError, match=r"backward: .*shares 2"):
                strategy.backward(model(torch.ones(1, 4)).sum(), model, optimizer)


def test_models_in_one_storage_share_nothing_if_their_parameters_do_not_overlap():
    flat = torch.randn(8)
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    first.weight, second.weight = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[4:].view(2, 2))
    with get_fake_strategy(bf16=False) as strategy:
        strategy.prepare(first, second)


def a_file():
    return open(__file__)


def a_graph():
    return torch.ones(2, requires_grad=True) * 2


@pytest.mark.parametrize("make", [threading.Lock, a_file, a_graph, lambda: {"in a dict": [threading.Event()]}])
def test_an_attribute_that_cannot_be_copied_is_named(make):
    model = TwoHeads()
    model.head.held = make()
    with get_fake_strategy(bf16=False) as strategy:
        optimizer = strategy.create_optimizer(model)
        with pytest.raises(
            StrategyError, match=r"TwoHeads, whose head\.held \(\w+\) cannot: .*set them after preparing"
        ):
            strategy.prepare((model, optimizer, None))
        strategy.prepare(TwoHeads())  # goes on
    if hasattr(model.head.held, "close"):
        model.head.held.close()


def test_constructors_that_read_values_are_explained():
    explained = pytest.raises(
        StrategyError, match=r"constructors that read no values of tensors.*\.item\(\).*device='cpu'"
    )
    with explained, weights_on_rank_0(1):
        torch.linspace(0, 1, 3)[0].item()


def test_plain_tensors_on_the_meta_device_are_named():
    model = TwoHeads()
    model.scale, model.head.scales = torch.ones(2), {"text": torch.ones(2, device="meta")}
    with pytest.raises(StrategyError, match=r"plain attributes on the meta device: head\.scales\..*register_buffer"):
        check_attributes(model)


def compiled_layer(model):
    model.backbone = torch.compile(model.backbone, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def actor_of(model):
    actor = Wrapper()
    actor.model = model
    return actor


class Wrapper(nn.Module):
    """LightRFT's actor: it calls its model."""

    is_actor = True

    def forward(self, inputs):
        return self.model(inputs)


COMPILED = {
    "model": lambda model: torch.compile(model, backend="eager"),
    "layer": compiled_layer,
    "in place": compiled_in_place,
    "model of an actor": lambda model: actor_of(torch.compile(model, backend="eager")),
    "actor": lambda model: torch.compile(actor_of(model), backend="eager"),
}


@pytest.mark.parametrize("build", COMPILED)
def test_a_compiled_model_trains_as_it_does_uncompiled_and_stays_compiled(build):
    weights, graphs = [], []
    for change in (lambda model: model, COMPILED[build]):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = change(TwoHeads())
        with get_fake_strategy(bf16=True, train_batch_size=1) as strategy:
            given_, optimizer = model, strategy.create_optimizer(model, lr=0.1)
            model, optimizer, _ = strategy.prepare((model, optimizer, None))
            assert model is given_
            counters.clear()
            for _ in range(2):
                output = model(torch.ones(1, 4))
                assert output.dtype is torch.bfloat16
                strategy.backward(output.float().square().sum(), model, optimizer)
                strategy.optimizer_step(optimizer, model)
            graphs.append(counters["frames"]["ok"])
            weights.append({name: tensor for bucket in strategy.full_parameters(model) for name, tensor in bucket})
            assert type(strategy.unwrap_model(model)).__name__ == "TwoHeads"
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert graphs[0] == 0 and graphs[1] > 0


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


def test_calling_an_offloaded_model_raises():
    with get_fake_strategy(bf16=False) as strategy:
        model = strategy.prepare(nn.Linear(2, 2))
        strategy.offload_model(model)
        with pytest.raises(StrategyError, match="reload_model"):
            model(torch.ones(1, 2))
        strategy.reload_model(model)
        model(torch.ones(1, 2))


def test_a_closed_strategy_raises_and_can_be_reopened():
    strategy = get_fake_strategy()
    strategy.close()
    with pytest.raises(StrategyError, match="all_reduce: expected an open strategy, got one that was closed"):
        strategy.all_reduce(1.0)
    strategy.setup_distributed()
    assert strategy.all_reduce(1.0) == 1.0
    strategy.close()


def loader_of(strategy, length=10):
    return strategy.setup_dataloader(list(range(length)), batch_size=2, drop_last=False)


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
def test_frozen_parameters_of_an_optimizer_never_change(when):
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


def test_unfreezing_a_prepared_parameter_raises():
    with get_fake_strategy(train_batch_size=1, bf16=False) as strategy:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        model, optimizer = in_training(strategy, model)
        model[0].requires_grad_(True)
        with pytest.raises(StrategyError, match=r"2 parameters of Sequential that were frozen .* \(0.weight first\)"):
            update(strategy, model, optimizer)


def test_a_call_that_is_refused_and_repeated_counts_its_micro_batch_once():
    with get_fake_strategy(train_batch_size=2, bf16=False) as strategy:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        model, optimizer = in_training(strategy, model)
        loss = model(torch.ones(3, 2)).sum().item()
        assert not update(strategy, model, optimizer).applied
        strategy.backward(model(torch.ones(3, 2)).sum(), model, optimizer)
        model[0].requires_grad_(True)
        with pytest.raises(StrategyError, match="were frozen when it was"):
            strategy.optimizer_step(optimizer, model)
        model[0].requires_grad_(False)
        assert strategy.optimizer_step(optimizer, model).loss == pytest.approx(loss)


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
            ("cosine", r"a scheduler with step\(\), got str \('cosine'"),
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


class Normalised(nn.Module):
    """A model with buffers that training changes."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.norm(x))


def trained_by_sgd(strategy, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    strategy.prepare((model, optimizer, None))
    return model, optimizer


def updated(strategy, model, optimizer, times=1):
    for _ in range(times):
        strategy.backward(model(torch.tensor([[1.0, 2.0], [3.0, 5.0]])).sum(), model, optimizer)
        strategy.optimizer_step(optimizer, model)


def average_of(strategy, kind=nn.Linear, *size):
    """An average whose parameters are all zero."""
    average = kind(*size)
    for parameter in average.parameters():
        nn.init.zeros_(parameter)
    return strategy.prepare(average)


def test_a_refused_moving_average_does_not_change():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        other = strategy.prepare(nn.Sequential(nn.Linear(2, 1)))
        updated(strategy, model, optimizer)
        for _ in range(2):
            with pytest.raises(ArgumentError, match="the average has no weight"):
                strategy.moving_average(model, other)


def test_an_average_moves_with_the_updates_after_it_was_made():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        updated(strategy, model, optimizer, times=3)
        average = average_of(strategy, nn.Linear, 2, 1)
        strategy.moving_average(model, average, beta=0.5)
        assert not average.weight.any()
        updated(strategy, model, optimizer)
        for _ in range(2):
            strategy.moving_average(model, average, beta=0.5)
        assert torch.equal(average.weight, 0.5 * model.weight)


def test_an_average_of_two_models_moves_with_the_updates_of_both():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        average = average_of(strategy, nn.Linear, 2, 1)
        first, second = (trained_by_sgd(strategy, nn.Linear(2, 1)) for _ in range(2))
        updated(strategy, *first)
        updated(strategy, *second)
        strategy.moving_average(first[0], average, beta=0.5)
        strategy.moving_average(second[0], average, beta=0.5)
        assert torch.equal(average.weight, 0.25 * first[0].weight + 0.5 * second[0].weight)


def test_an_average_does_not_move_because_its_model_was_loaded(tmp_path):
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        updated(strategy, model, optimizer, times=2)
        strategy.save_ckpt(model, tmp_path)
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        average = average_of(strategy, nn.Linear, 2, 1)
        updated(strategy, model, optimizer)
        strategy.load_ckpt(model, tmp_path)
        strategy.moving_average(model, average, beta=0.5)
        assert not average.weight.any()
        updated(strategy, model, optimizer)
        strategy.moving_average(model, average, beta=0.5)
        assert torch.equal(average.weight, 0.5 * model.weight)


@pytest.mark.parametrize("when", ["made late", "behind by one"])
def test_a_checkpoint_knows_whether_an_average_includes_the_last_update(tmp_path, when):
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        early = average_of(strategy, nn.Linear, 2, 1)
        updated(strategy, model, optimizer, times=2)
        late = average_of(strategy, nn.Linear, 2, 1)
        strategy.save_ckpt({"model": model, "average": late if when == "made late" else early}, tmp_path)
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = trained_by_sgd(strategy, nn.Linear(2, 1))
        average = average_of(strategy, nn.Linear, 2, 1)
        strategy.load_ckpt({"model": model, "average": average}, tmp_path)
        for _ in range(2):
            strategy.moving_average(model, average, beta=0.5)
        assert torch.equal(average.weight, (0.0 if when == "made late" else 0.5) * model.weight)


def test_buffers_that_training_changes_are_not_averaged_which_is_said_once():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        average = average_of(strategy, Normalised)
        model, optimizer = trained_by_sgd(strategy, Normalised())
        updated(strategy, model, optimizer)
        with pytest.warns(UserWarning, match=r"parameters only.*Normalised.*\(norm.running_mean first\)"):
            strategy.moving_average(model, average)
        assert not average.norm.running_mean.any()
        updated(strategy, model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            strategy.moving_average(model, average)


def test_a_new_average_inherits_nothing_from_a_deleted_one():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        trained_by_sgd(strategy, nn.Linear(2, 1))
        for _ in range(20):  # memory is used again, and so is its address
            average = nn.Linear(2, 1)
            assert strategy._averages.updates_in(average, strategy._models.in_training) == 0
            strategy._averages.restore(average, 1)
            del average


class SparseLookup(nn.Module):
    """Makes sparse gradients by a functional embedding, which preparing cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 2))

    def forward(self, indices):
        return nn.functional.embedding(indices, self.table, sparse=True).sum()


def test_adapters_whose_ranks_change_are_refused_by_name_until_the_strategy_is_closed():
    peft = pytest.importorskip("peft")
    from llamas import llama

    settings = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1)
    model = peft.get_peft_model(llama(), settings)
    with FakeStrategy(device="cpu") as strategy:
        strategy.prepare((model, strategy.create_optimizer(model), None))
        with pytest.raises(UnsupportedOperationError, match=r"update_and_allocate: .*AdaLoRA in PeftModel.* use LoRA"):
            model.base_model.update_and_allocate(1)
    assert "update_and_allocate" not in vars(model.base_model)


def test_a_sparse_gradient_is_refused_and_dropped():
    with FakeStrategy(bf16=False, train_batch_size=1) as strategy:
        lookup = SparseLookup()
        model, optimizer, _ = strategy.prepare((lookup, strategy.create_optimizer(lookup, lr=0.1), None))
        strategy.backward(model(torch.tensor([1])), model, optimizer)
        with pytest.raises(
            UnsupportedOperationError, match="expected dense gradients of SparseLookup, got a sparse one"
        ):
            strategy.optimizer_step(optimizer, model)
        assert torch.equal(model.table, torch.ones(4, 2))
        with pytest.raises(StrategyError, match="expected a backward since the last update"):
            strategy.optimizer_step(optimizer, model)  # nothing is left of it
        strategy.backward(model.table.sum(), model, optimizer)
        assert strategy.optimizer_step(optimizer, model).loss == 8.0, "of the update that was not dropped"
