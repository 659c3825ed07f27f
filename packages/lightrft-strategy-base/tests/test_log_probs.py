"""`linear_log_probs`: the numbers and gradients of the plain computation, in the memory of one chunk."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightrft.config import ArgumentError, ArgumentTypeError, LightRFTError
from lightrft.strategy import linear_log_probs
from lightrft.strategy.log_probs import ChunkedLogProbs, logit_log_probs

HIDDEN, VOCABULARY = 5, 13


def tensors(dtype, *, tokens=(2, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in [(*tokens, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)]
    ]
    targets = torch.randint(0, VOCABULARY, tokens, generator=generator)
    return *made, targets.masked_fill(torch.rand(tokens, generator=generator) < 0.3, -100)


def plain(hidden, weight, bias, targets, temperature=1.0, soft_cap=None):
    """Log-probabilities and entropies as torch.distributions computes them."""
    logits = nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    distribution = torch.distributions.Categorical(logits=logits / temperature, validate_args=False)
    kept = targets != -100
    zero = torch.zeros((), dtype=logits.dtype)
    return (
        torch.where(kept, distribution.log_prob(targets.clamp(min=0)), zero),
        torch.where(kept, distribution.entropy(), zero),
    )


def gradients(got, inputs, seed=1):
    """Gradients of a loss in which each token has a weight of its own, on log-probability and entropy."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((torch.randn(tensor.shape, generator=generator) * tensor).sum() for tensor in got)
    return torch.autograd.grad(loss, inputs)


@given(
    dtype=st.sampled_from([torch.float32, torch.float64]), chunk_size=st.integers(1, 20), biased=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7, 2.0]), soft_cap=st.sampled_from([None, 1.5]), seed=st.integers(0, 99),
    tokens=st.sampled_from([(2, 9), (7,), (1, 1), (2, 3, 4)]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_the_logits(dtype, chunk_size, biased, temperature, soft_cap, seed, tokens):
    hidden, weight, bias, targets = tensors(dtype, tokens=tokens, seed=seed)
    inputs = (hidden, weight, bias) if biased else (hidden, weight)
    got = linear_log_probs(
        hidden, weight, targets, bias=bias if biased else None, temperature=temperature, soft_cap=soft_cap,
        chunk_size=chunk_size, entropy=True,
    )  # fmt: skip
    wanted = plain(hidden, weight, bias if biased else None, targets, temperature, soft_cap)
    tolerance = {"rtol": 1e-6, "atol": 2e-6} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for mine, its in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, its, **tolerance)
        assert (mine[targets == -100] == 0).all()
    for mine, its in zip(gradients(got, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, its, **(tolerance | {"rtol": 1e-5} if dtype is torch.float32 else tolerance))


def test_the_plain_computation_is_that_of_torch_distributions():
    hidden, weight, bias, targets = tensors(torch.float32)
    logits = nn.functional.linear(hidden, weight, bias)
    got = logit_log_probs(logits, targets, temperature=0.7, entropy=True)
    for mine, its in zip(got, plain(hidden, weight, bias, targets, 0.7), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-6)
    assert logit_log_probs(logits, targets).entropy is None


def test_the_gradient_is_the_numeric_one():
    hidden, weight, bias, targets = tensors(torch.float64, tokens=(5,))

    def both(*inputs):
        return tuple(linear_log_probs(inputs[0], inputs[1], targets, bias=inputs[2], chunk_size=2, entropy=True))

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


@pytest.mark.parametrize("used", ["log_probs", "entropy"])
def test_a_loss_of_log_probabilities_or_of_entropies_alone(used):
    hidden, weight, bias, targets = tensors(torch.float64)
    got = linear_log_probs(hidden, weight, targets, bias=bias, chunk_size=4, entropy=True)
    wanted = plain(hidden, weight, bias, targets)[used == "entropy"]
    for mine, its in zip(
        gradients([getattr(got, used)], (hidden, weight, bias)),
        gradients([wanted], (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("frozen", [*itertools.combinations(range(3), 2)])
def test_only_trainable_tensors_get_a_gradient(frozen):
    *inputs, targets = tensors(torch.float32)
    for index in frozen:
        inputs[index].requires_grad_(False)
    linear_log_probs(inputs[0], inputs[1], targets, bias=inputs[2]).log_probs.sum().backward()
    assert [tensor.grad is None for tensor in inputs] == [index in frozen for index in range(3)]


def test_entropy_is_left_out_unless_asked_for():
    hidden, weight, _, targets = tensors(torch.float32)
    assert linear_log_probs(hidden, weight, targets).entropy is None


def test_half_precision_has_its_softmax_and_its_weight_gradients_in_fp32():
    hidden, weight, bias, targets = tensors(torch.bfloat16, tokens=(4, 200))
    result = linear_log_probs(hidden, weight, targets, bias=bias, chunk_size=8, entropy=True)
    wanted = plain(hidden, weight, bias, targets)
    assert result.log_probs.dtype is torch.float32
    for mine, its in zip(result, wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=2e-6)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    exact = gradients(plain(*doubles, targets), doubles)
    errors = [
        [float((mine.double() - its).norm() / its.norm()) for mine, its in zip(got, exact, strict=True)]
        for got in (gradients(result, (hidden, weight, bias)), gradients(wanted, (hidden, weight, bias)))
    ]
    assert all(mine < 1.5 * its + 1e-3 for mine, its in zip(*errors, strict=True)), errors


def test_autocast_computes_the_product_in_its_dtype():
    hidden, weight, bias, targets = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_log_probs(hidden, weight, targets, bias=bias, entropy=True)
        wanted = plain(hidden, weight, bias, targets)
    for mine, its in zip(result, wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=2e-6)
    got = gradients(result, (hidden, weight, bias))
    assert [tensor.dtype for tensor in got] == 3 * [torch.float32]
    for mine, its in zip(got, gradients(wanted, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(mine, its, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "targets", [torch.full((2, 3), -100), torch.zeros(2, 0, dtype=torch.int64)], ids=["ignored", "none"]
)
def test_no_target_at_all_gives_zeros_with_a_graph(targets):
    hidden = torch.randn(*targets.shape, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    got = linear_log_probs(hidden, weight, targets, entropy=True)
    assert got.log_probs.shape == targets.shape
    assert not got.log_probs.any()
    (got.log_probs.sum() + got.entropy.sum()).backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_two_backward_passes_through_one_graph_give_the_same():
    hidden, weight, _, targets = tensors(torch.float32)
    loss = linear_log_probs(hidden, weight, targets, chunk_size=4).log_probs.sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved_for_backward(mode):
    hidden, weight, _, targets = tensors(torch.float32)
    with mode():
        assert linear_log_probs(hidden, weight, targets).log_probs.grad_fn is None


def test_the_logits_of_one_chunk_are_in_memory_at_a_time(monkeypatch):
    shapes = []
    original = ChunkedLogProbs.forward.__globals__["_Head"].logits

    def logits(head, hidden):
        shapes.append(tuple(head.buffer.shape))
        return original(head, hidden)

    monkeypatch.setattr(ChunkedLogProbs.forward.__globals__["_Head"], "logits", logits)
    hidden, weight, _, targets = tensors(torch.float32, tokens=(30,))
    linear_log_probs(hidden, weight, targets, chunk_size=8).log_probs.sum().backward()
    chunks = -(-int((targets != -100).sum()) // 8)
    assert shapes == 2 * chunks * [(8, VOCABULARY)]


HIDDEN_STATES, WEIGHT, TARGETS = torch.zeros(2, 3, HIDDEN), torch.zeros(VOCABULARY, HIDDEN), torch.zeros(2, 3).long()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"hidden": [1.0]}, ArgumentTypeError, "expected hidden to be a floating-point tensor, got"),
        ({"hidden": HIDDEN_STATES.long()}, ArgumentTypeError, "expected hidden to be .*got torch.int64"),
        ({"weight": None}, ArgumentTypeError, "expected weight to be a floating-point tensor, got None"),
        ({"weight": WEIGHT.bfloat16()}, ArgumentTypeError, "expected weight to have the dtype of hidden .*autocast"),
        ({"weight": WEIGHT.to("meta")}, ArgumentError, "expected weight on the device of hidden"),
        ({"weight": WEIGHT.t()}, ArgumentError, r"expected hidden \(..., H\) and weight \(V, H\), got \(2, 3, 5\) and"),
        ({"weight": torch.zeros(0)}, ArgumentError, "A sharded model has no weights outside"),
        ({"bias": torch.zeros(3)}, ArgumentError, r"expected bias to be \(13,\).*got \(3,\)"),
        ({"targets": TARGETS.float()}, ArgumentTypeError, r"expected targets .*got torch.float32. Convert"),
        ({"targets": [0]}, ArgumentTypeError, "expected targets to be a tensor of token ids"),
        ({"targets": TARGETS[:, 1:]}, ArgumentError, r"expected targets to be \(2, 3\).*got \(2, 2\). Targets are not shifted"),
        ({"targets": TARGETS + 13}, ArgumentError, "expected targets from 0 to 12, .*got 13"),
        ({"targets": TARGETS - 1}, ArgumentError, "expected targets from 0 to 12, .*got -1"),
        ({"temperature": 0.0}, ArgumentError, "expected temperature to be a finite number above 0, got float"),
        ({"temperature": float("nan")}, ArgumentError, "expected temperature"),
        ({"temperature": True}, ArgumentError, "expected temperature"),
        ({"soft_cap": -1.0}, ArgumentError, "expected soft_cap to be a number above 0, or None, got float"),
        ({"chunk_size": 0}, ArgumentError, "expected chunk_size to be an integer of at least 1, got int"),
        ({"chunk_size": 1.5}, ArgumentError, "expected chunk_size"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_match_are_refused(change, kind, message):
    arguments = {"hidden": HIDDEN_STATES, "weight": WEIGHT, "targets": TARGETS, **change}
    with pytest.raises(LightRFTError, match=message) as caught:
        linear_log_probs(**arguments)
    assert type(caught.value) is kind
    assert str(caught.value).startswith("linear_log_probs: ")
