"""The caller's optimizers: tried on parts of parameters, guarded in training, restored in their own form."""

import pytest
import torch
from torch import nn

from lightrft.config import StrategyError, UnsupportedOperationError
from lightrft.strategy import FakeStrategy, get_fake_strategy
from lightrft.strategy.backend import check_elementwise
from lightrft.strategy.fake_strategy import FakeBackend


class Plain(torch.optim.Optimizer):
    """Counts its steps as a Python number, and moves against the gradient."""

    def __init__(self, parameters, lr=0.1, **more):
        super().__init__(parameters, {"lr": lr, **more})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
                state["step"] += 1
                self.move(parameter, group)

    def move(self, parameter, group):
        parameter.sub_(parameter.grad * group["lr"])


class TrustRatio(Plain):
    def move(self, parameter, group):
        parameter.sub_(parameter.grad * (group["lr"] * parameter.norm() / parameter.grad.norm()))


class GlobalNorm(Plain):
    """Clips by the norm of all that it holds."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            norm = torch.stack([parameter.grad.norm() for parameter in group["params"]]).norm()
            for parameter in group["params"]:
                parameter.sub_(parameter.grad * (group["lr"] / norm))


class OrthogonalIfAsked(Plain):
    """An optimizer of two algorithms, chosen by group."""

    def move(self, parameter, group):
        update = parameter.grad
        if group["orthogonal"]:
            update = update / torch.linalg.matrix_norm(update, 2)
        parameter.sub_(update * group["lr"])


def in_parts(count):
    return lambda tensors: [[part] for part in torch.cat([tensor.reshape(-1) for tensor in tensors]).chunk(count)]


def tried(optimizer, count=2):
    check_elementwise(optimizer, in_parts(count), lambda p: p.ndim, device=torch.device("cpu"), refusal="Use another.")


def matrix_and_bias():
    return [*nn.Linear(4, 3).parameters()]


ALIKE = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adamax", "Adadelta", "ASGD", "Rprop", "Adagrad"]


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_an_optimizer_that_treats_each_element_alone_may_get_parts(name, rate):
    tried(getattr(torch.optim, name)(matrix_and_bias(), lr=rate))


@pytest.mark.parametrize("rate", [0.0, 1e-6])
@pytest.mark.parametrize("optimizer_class", [torch.optim.Adafactor, TrustRatio])
def test_an_optimizer_of_full_matrices_is_refused_also_if_it_starts_with_a_warm_up(optimizer_class, rate):
    with pytest.raises(StrategyError, match=rf"element by element, got {optimizer_class.__name__}: .*Use another"):
        tried(optimizer_class(matrix_and_bias(), lr=rate), count=1)


def test_an_optimizer_with_a_global_norm_is_accepted_unsharded_and_refused_sharded():
    tried(GlobalNorm(matrix_and_bias()), count=1)
    with pytest.raises(StrategyError, match="got GlobalNorm"):
        tried(GlobalNorm(matrix_and_bias()), count=2)


def test_an_optimizer_that_cannot_be_probed_is_refused_by_name():
    with pytest.raises(StrategyError, match="got Muon, which raised ValueError"):
        tried(torch.optim.Muon([nn.Parameter(torch.ones(3, 3))]))


def test_every_kind_of_group_is_tried():
    groups = [{"params": [parameter], "orthogonal": False} for parameter in matrix_and_bias()]
    tried(OrthogonalIfAsked(groups))
    with pytest.raises(StrategyError, match="got OrthogonalIfAsked"):
        tried(OrthogonalIfAsked([{**groups[0], "orthogonal": True}, groups[1]]))


def test_a_trial_changes_neither_the_optimizer_nor_the_random_stream():
    parameters = matrix_and_bias()
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # replaces step on the object
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("the caller's hook was called"))
    before, random = [parameter.clone() for parameter in parameters], torch.get_rng_state()
    tried(optimizer)
    assert all(map(torch.equal, parameters, before)) and not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert torch.equal(torch.get_rng_state(), random)


@pytest.fixture
def strategy():
    with get_fake_strategy(bf16=False, train_batch_size=2) as made:
        yield made


def prepared(strategy, model=None):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)) if model is None else model
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    return strategy.prepare((model, optimizer, None))[:2]


def backward(strategy, model, optimizer):
    strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)


@pytest.mark.parametrize("of", ["optimizer", "model"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_refused_within_an_update_and_harmless_between(strategy, of, set_to_none):
    model, optimizer = prepared(strategy)
    owner = {"optimizer": optimizer, "model": model}[of]
    owner.zero_grad(set_to_none=set_to_none)
    backward(strategy, model, optimizer)
    for _ in range(2):
        with pytest.raises(StrategyError, match=r"zero_grad.*expected no call within an update"):
            owner.zero_grad(set_to_none=set_to_none)
        strategy.optimizer_step(optimizer, model)
        if strategy._models.has_pending_gradient:
            backward(strategy, model, optimizer)
    owner.zero_grad(set_to_none=set_to_none)


def clear(model):
    for parameter in model.parameters():
        parameter.grad = None


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def add_directly(model):
    model(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize("change", [clear, clip, add_directly])
def test_gradients_that_are_changed_directly_are_noticed(strategy, change):
    model, optimizer = prepared(strategy)
    backward(strategy, model, optimizer)
    change(model)
    with pytest.raises(
        StrategyError, match=r"optimizer_step: expected gradients of Sequential that only strategy.backward made"
    ):
        strategy.optimizer_step(optimizer, model)


def test_a_gradient_that_was_there_before_an_update_is_noticed(strategy):
    model, optimizer = prepared(strategy)
    add_directly(model)
    with pytest.raises(StrategyError, match="backward: expected gradients of Sequential"):
        backward(strategy, model, optimizer)


def test_a_direct_step_is_refused_until_the_strategy_is_closed():
    with get_fake_strategy(bf16=False, train_batch_size=1) as strategy:
        model, optimizer = prepared(strategy)
        backward(strategy, model, optimizer)
        before = model[0].weight.clone()
        with pytest.raises(StrategyError, match=r"SGD.step: .* Call strategy.optimizer_step"):
            optimizer.step()
        assert torch.equal(model[0].weight, before)
        assert strategy.optimizer_step(optimizer, model).applied
    add_directly(model)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": list(model[1].parameters())})


def test_a_group_that_is_added_later_is_refused(strategy):
    model, optimizer = prepared(strategy)
    with pytest.raises(StrategyError, match=r"SGD\.add_param_group: .*before prepare"):
        optimizer.add_param_group({"params": list(model[1].parameters())})
    backward(strategy, model, optimizer)


@pytest.mark.parametrize("change", [
    lambda optimizer, extra: optimizer.param_groups.append({**optimizer.param_groups[0], "params": [extra]}),
    lambda optimizer, extra: optimizer.param_groups[0]["params"].append(extra),
    lambda optimizer, extra: optimizer.param_groups[0]["params"].pop(),
])  # fmt: skip
def test_groups_that_are_changed_in_place_are_refused(strategy, change):
    model, optimizer = prepared(strategy)
    change(optimizer, model[1].weight)
    with pytest.raises(
        StrategyError, match="backward: expected the parameter groups with which Sequential was prepared"
    ):
        backward(strategy, model, optimizer)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize(("model", "words"), [
    (Complex(), "complex ones that train in Complex: phase"),
    (nn.Sequential(nn.Embedding(3, 2, sparse=True)), "sparse=True in Sequential: 0"),
    (nn.Sequential(nn.EmbeddingBag(3, 2, sparse=True)), "sparse=True in Sequential: 0"),
])  # fmt: skip
def test_gradients_that_cannot_be_averaged_and_clipped_are_refused_when_preparing(strategy, model, words):
    with pytest.raises(UnsupportedOperationError, match=words):
        strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1), None))
    strategy.prepare(model)  # for inference


class Derived(torch.optim.AdamW):
    """A script's own AdamW."""


class OneAlgorithm(FakeBackend):
    """Lets these optimizers load each other's state."""

    def algorithm(self, optimizer):
        return "AdamW"


class Alike(FakeStrategy):
    name, backend_class = "alike", OneAlgorithm


@pytest.mark.parametrize("here", [torch.optim.AdamW, Derived, Plain])
@pytest.mark.parametrize("there", [torch.optim.AdamW, Plain])
def test_a_number_takes_the_form_that_the_optimizer_itself_makes(tmp_path, there, here):
    with Alike(bf16=False, train_batch_size=1) as strategy:
        for optimizer_class in (there, here):
            model = nn.Linear(2, 1)
            optimizer = strategy.prepare((model, optimizer_class(model.parameters(), lr=0.1), None))[1]
            if optimizer_class is there and not list(tmp_path.iterdir()):
                backward(strategy, model, optimizer)
                strategy.optimizer_step(optimizer, model)
                strategy.save_ckpt(model, tmp_path)
        strategy.load_ckpt(model, tmp_path)
        steps = [state["step"] for state in optimizer.state.values()]
        assert [type(step) for step in steps] == [int if here is Plain else torch.Tensor] * 2
        backward(strategy, model, optimizer)
        assert strategy.optimizer_step(optimizer, model).applied
        assert [int(state["step"]) for state in optimizer.state.values()] == [2, 2]
