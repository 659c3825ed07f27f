"""Preparing models in one process: wrappers, shared parameters, compiled models, and what is refused."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tied_model import Tied
from torch import nn
from torch._dynamo.utils import counters

from lightrft.config import StrategyError, UnsupportedOperationError
from lightrft.strategy import FakeStrategy, get_fake_strategy
from lightrft.strategy.backend.modules import materialize
from lightrft.strategy.models.meta import weights_on_rank_0
from lightrft.strategy.models.modules import check_attributes, meta_copy
from lightrft.strategy.models.registry import inner_model


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


def test_a_hugging_face_model_is_not_a_wrapper_of_its_backbone():
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


def test_a_model_that_shares_parameters_is_not_accepted_unprepared():
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


def test_a_constructor_that_reads_values_gets_an_explanation():
    explained = pytest.raises(
        StrategyError, match=r"constructors that read no values of tensors.*\.item\(\).*device='cpu'"
    )
    with explained, weights_on_rank_0(1):
        torch.ones(3)[0].item()  # transformers, once it has loaded a model, leaves linspace on the CPU


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


def test_preparing_for_inference_and_then_for_training_is_refused():
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


def test_prepare_returns_lists_and_named_tuples_as_such():
    class Pair(NamedTuple):
        left: Any
        right: Any

    with get_fake_strategy() as strategy:
        given = [nn.Linear(1, 1), None, None]
        assert strategy.prepare(given) == given
        pair = strategy.prepare(Pair(nn.Linear(1, 1), None))
        assert isinstance(pair, Pair) and pair.right is None
        assert not any(parameter.requires_grad for parameter in pair.left.parameters())


def test_settings_that_a_script_leaves_out_come_from_the_strategy():
    with get_fake_strategy(bf16=False, l2=0.3, adam_betas=(0.5, 0.6), critic_pretrain=True) as strategy:
        given = SimpleNamespace(actor_learning_rate=7e-3)
        (_, optimizer, _), (critic, other, _), _, _ = strategy.prepare_models_and_optimizers(
            nn.Linear(2, 2), nn.Linear(2, 1), None, None, given, 10
        )
        assert optimizer.param_groups[0]["initial_lr"] == 7e-3
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
        assert optimizer.param_groups[0]["weight_decay"] == 0.3
        assert critic is not None and other is not None


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
