"""`token_log_probs` in one process: models of every make give the same numbers from logits and without them."""

import functools

import policies
import pytest
import torch
from llamas import Actor, falcon, llama, with_adapter
from torch import nn
from torch._dynamo.utils import counters

from lightrft.config import ArgumentError, ArgumentTypeError, StrategyError, UnsupportedOperationError
from lightrft.strategy import FakeStrategy
from lightrft.strategy.log_probs import ChunkedLogProbs
from lightrft.strategy.models.token_log_probs import replaced_forward

transformers = pytest.importorskip("transformers")


def fake(fused=True, **settings):
    settings = {"bf16": False, "train_batch_size": 1, "micro_train_batch_size": 1, **settings}
    return FakeStrategy(device="cpu", strict=True, fused_linear_logprob=fused, max_norm=None, **settings)


def ids(rows=2, length=6):
    return torch.randint(3, 17, (rows, length), generator=torch.Generator().manual_seed(5))


def tiny(family, **more):
    """A tiny language model of a family of transformers, with logits that are not close to 0."""
    sizes = {
        "vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes | more))
        model.get_output_embeddings().weight.data.mul_(20)
        return model


def with_trained_head():
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(8)
        chosen = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], r=2)
        model = peft.get_peft_model(llama(tied=False), chosen)
        model.get_output_embeddings().modules_to_save["default"].weight.data.mul_(2)
        return model


def with_adapter_on_the_head():
    import peft

    return peft.get_peft_model(llama(tied=False), peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2))


class Plain(nn.Module):
    """A language model of no library: a head with a bias, and logits that it returns as a tensor."""

    def __init__(self, change=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(17, 6), nn.Linear(6, 17)
        self.dropout, self.change = nn.Dropout(0.5), change

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        logits = self.head(self.dropout(self.embed(input_ids)))
        return logits if self.change is None else self.change(logits)


MODELS = {
    "llama": llama,
    "a head of its own": functools.partial(llama, tied=False),
    "LoRA": with_adapter,
    "LoRA and a trained head": with_trained_head,
    "an actor": Actor,
    "a soft cap": functools.partial(tiny, "Gemma2", final_logit_softcapping=3.0),
    "a factor": functools.partial(tiny, "Cohere", logit_scale=0.25),
    "a divisor": functools.partial(tiny, "Granite", logits_scaling=8.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_without_logits_equals_training_with_logits(name):
    got = []
    for fused in (True, False):
        with fake(fused) as strategy:
            got.append(policies.train(strategy, MODELS[name]()))
    assert got[0].distance(got[1]) < 5e-6
    assert got[0].parameter_distance(got[1]) < 5e-6


def test_training_from_logits_equals_plain_torch():
    with fake(fused=False) as strategy:
        got = policies.train(strategy, llama())
    wanted = policies.reference(llama, 1, 0)
    assert got.distance(wanted) < 5e-6
    assert got.parameter_distance(wanted) < 5e-6


def test_the_logits_of_the_batch_are_never_computed():
    with fake() as strategy:
        model = strategy.prepare(llama())
        tokens, shapes = ids(2, 12), []
        model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
        strategy.token_log_probs(model, tokens)
        strategy.token_log_probs(model, tokens, entropy=True)
    assert shapes == [(1, 2, 17), (2, 12, 1), (2, 12, 2)]  # the first one is the trial


def test_a_head_of_bfloat16():
    with fake() as fused, fake(fused=False) as plain:
        got, wanted = (s.token_log_probs(s.prepare(llama().bfloat16()), ids(), entropy=True) for s in (fused, plain))
    for mine, its in zip(got, wanted, strict=True):
        assert mine.dtype is torch.float32
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_values_are_those_of_torch_distributions(fused):
    tokens, mask = policies.batch(0, 0)
    with fake(fused) as strategy:
        model = strategy.prepare(llama())
        got = strategy.token_log_probs(model, tokens, mask, temperature=0.5, entropy=True)
        distribution = torch.distributions.Categorical(logits=model(tokens, attention_mask=mask).logits[:, :-1] / 0.5)
    kept = mask[:, 1:] * mask[:, :-1]
    torch.testing.assert_close(got.log_probs, distribution.log_prob(tokens[:, 1:]) * kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.entropy, distribution.entropy() * kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_targets_choose_what_is_read_at_each_position(fused):
    tokens = ids()
    targets = torch.full((2, 5), -100)
    targets[0, 3], targets[1, 0] = 7, 11
    with fake(fused) as strategy:
        model = strategy.prepare(llama())
        got = strategy.token_log_probs(model, tokens, targets=targets).log_probs
        logs = model(tokens).logits.log_softmax(-1)
    wanted = torch.zeros(2, 5)
    wanted[0, 3], wanted[1, 0] = logs[0, 3, 7], logs[1, 0, 11]
    torch.testing.assert_close(got, wanted)


def test_the_trial_changes_no_random_state_no_buffer_and_no_mode():
    with fake() as strategy:
        model = Plain()
        optimizer = strategy.create_optimizer(model, lr=1e-3)
        model, _, _ = strategy.prepare((model.train(), optimizer, None))
        model.dropout.eval()
        before = torch.get_rng_state()
        strategy.token_log_probs(model, ids())
        assert torch.equal(torch.get_rng_state(), before)
        assert (model.training, model.embed.training, model.dropout.training) == (True, True, False)


def test_an_adapter_that_is_switched_off_for_the_reference():
    with fake() as fused, fake(fused=False) as plain:
        got = []
        for strategy in (fused, plain):
            model = strategy.prepare(with_trained_head())
            on = strategy.token_log_probs(model, ids()).log_probs
            with model.disable_adapter():
                got.append(strategy.token_log_probs(model, ids()).log_probs)
            assert not torch.allclose(on, got[-1], atol=1e-2)
    torch.testing.assert_close(got[0], got[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_reference_pass_keeps_no_graph(mode):
    with fake() as strategy:
        model = strategy.prepare(llama())
        with mode():
            assert not strategy.token_log_probs(model, ids(), entropy=True).entropy.requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch, where a graph goes on after a break
def test_a_compiled_model_is_compiled_once_for_each_kind_of_call():
    tokens = ids()
    with fake() as strategy:
        model = torch.compile(llama(), backend="eager")
        model, _, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
        for index in range(12):
            if index == 2:
                counters.clear()
            logs = (model(tokens).logits / (1 + index)).log_softmax(-1)
            got = strategy.token_log_probs(model, tokens, temperature=1 + index).log_probs
            wanted = logs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert counters["frames"]["total"] == 0


def test_the_head_is_restored_after_a_failed_call():
    with fake() as strategy:
        model = strategy.prepare(llama())
        strategy.token_log_probs(model, ids())
        with pytest.raises(IndexError):
            strategy.token_log_probs(model, ids() + 99, targets=ids()[:, 1:])
        assert model(ids()).logits.shape == (2, 6, 17)
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="here"), replaced_forward([layer], lambda *_: torch.zeros(1)):
        raise RuntimeError("here")
    assert "forward" not in vars(layer)


def test_the_loss_of_another_model_is_refused():
    with fake() as strategy:
        first, second = (
            strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None)) for model in (llama(), llama())
        )
        loss = strategy.token_log_probs(second[0], ids()).log_probs.sum()
        with pytest.raises(StrategyError, match="expected a loss that depends on a trainable parameter"):
            strategy.backward(loss, first[0], first[1])
        strategy.backward(loss, second[0], second[1])


def test_the_name_of_the_function_that_a_loss_is_seen_through():
    weight = torch.zeros(3, 2, requires_grad=True)
    from lightrft.strategy import linear_log_probs
    from lightrft.strategy.log_probs import TRANSPARENT

    got = linear_log_probs(torch.zeros(4, 2), weight, torch.zeros(4).long()).log_probs
    node = got.grad_fn
    while not isinstance(node, torch.autograd.function.BackwardCFunction):
        node = node.next_functions[0][0]
    assert type(node).__name__ in TRANSPARENT
    assert issubclass(type(node), ChunkedLogProbs._backward_cls)


def masked(logits):
    return logits.index_fill(-1, torch.tensor([3]), -1e9)


REFUSED = {
    "a factor": (functools.partial(Plain, lambda logits: 2 * logits), "logits that differ by up to .* changes them"),
    "a cap": (functools.partial(Plain, torch.tanh), "logits that differ by up to"),
    "a mask": (functools.partial(Plain, masked), r"logits that differ by up to 1e\+09"),
    "fewer tokens": (functools.partial(Plain, lambda logits: logits[..., :9]), r"1 calls \(\(1, 2, 17\)\) and logits \(1, 2, 9\)"),
    "the last position": (functools.partial(Plain, lambda logits: logits[:, -1:]), r"logits \(1, 1, 17\)"),
    "LoRA on the head": (with_adapter_on_the_head, "expected the LM head of .* to be a plain nn.Linear, got peft.*lora"),
    "no head": (functools.partial(nn.Embedding, 17, 5), r"expected Embedding to return its LM head from get_output_embeddings"),
    "another cap": (functools.partial(tiny, "Llama", final_logit_softcapping=3.0), r"output of its head, with final_logit_softcapping=3.0, got"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_changes_its_logits_or_has_another_head_is_refused_by_name(name):
    build, message = REFUSED[name]
    with fake() as strategy:
        model = strategy.prepare(build())
        for _ in range(2):
            with pytest.raises(UnsupportedOperationError, match=f"token_log_probs: (?s:.*){message}") as caught:
                strategy.token_log_probs(model, ids())
            assert "fused_linear_logprob=False" in str(caught.value)


def test_a_head_that_gets_other_positions_is_refused():
    with fake() as strategy:
        model = strategy.prepare(llama())
        with pytest.raises(
            UnsupportedOperationError, match=r"each of the \(2, 6\) tokens, got \(2, 1, 16\).*logits_to_keep"
        ):
            strategy.token_log_probs(model, ids(), logits_to_keep=1)
    with (
        fake(fused=False) as strategy,
        pytest.raises(ArgumentError, match=r"got \(2, 1, 17\). Leave out logits_to_keep"),
    ):
        strategy.token_log_probs(strategy.prepare(llama()), ids(), logits_to_keep=1)


TOKENS = ids()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"input_ids": [[1, 2]]}, ArgumentTypeError, "expected input_ids to be a tensor of token ids"),
        ({"input_ids": TOKENS.float()}, ArgumentTypeError, "expected input_ids .*got torch.float32"),
        ({"input_ids": TOKENS[0]}, ArgumentError, r"expected input_ids \(B, T\) with B of at least 1 and T of at least 2, got \(6,\)"),
        ({"input_ids": TOKENS[:, :1]}, ArgumentError, r"got \(2, 1\)"),
        ({"input_ids": TOKENS[:0]}, ArgumentError, r"got \(0, 6\)"),
        ({"attention_mask": [1]}, ArgumentTypeError, "expected attention_mask to be a tensor, or None"),
        ({"attention_mask": TOKENS[:, 1:]}, ArgumentError, r"the shape of input_ids \(2, 6\), got \(2, 5\)"),
        ({"targets": TOKENS}, ArgumentError, r"expected targets to be \(2, 5\).*got \(2, 6\)"),
        ({"targets": TOKENS[:, 1:].float()}, ArgumentTypeError, "expected targets"),
        ({"targets": TOKENS[:, 1:] + 17}, ArgumentError, "expected targets from 0 to 16"),
        ({"labels": TOKENS}, ArgumentError, r"expected no argument labels.*targets=labels\[:, 1:\]"),
        ({"position_ids": TOKENS[:, 1:]}, ArgumentError, r"expected position_ids \(B, T\) for input_ids \(2, 6\), got \(2, 5\)"),
        ({"position_ids": torch.arange(6)}, ArgumentError, r"expected position_ids \(B, T\).*got \(6,\)"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, ArgumentError, r"expected targets with an attention mask of shape \(2, 1, 6, 6\)"),
        ({"temperature": -1.0}, ArgumentError, "expected temperature to be a finite number above 0, got float"),
        ({"entropy": "yes"}, ArgumentTypeError, "expected entropy to be True or False, got str"),
        ({"model": nn.Linear(2, 2)}, StrategyError, "expected a model that this strategy has prepared"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(fused, change, kind, message):
    with fake(fused) as strategy:
        model = strategy.prepare(llama())
        with pytest.raises(kind, match=message):
            strategy.token_log_probs(**{"model": model, "input_ids": TOKENS, **change})


class Wrapped(nn.Module):
    """A model whose forward names no argument."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, *inputs, **more):
        return self.inner(*inputs, **more).logits


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [llama, with_adapter, lambda: Wrapped(llama())], ids=["llama", "LoRA", "wrapper"])
def test_packed_sequences_do_not_see_each_other(fused, make):
    first, second = ids(1, 4), ids(1, 7)[:, 1:]
    with fake(fused) as strategy:
        model = strategy.prepare(make())
        alone = [strategy.token_log_probs(model, each).log_probs for each in (first, second)]
        positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
        packed = strategy.token_log_probs(model, torch.cat([first, second], dim=1), position_ids=positions).log_probs
        assert packed[0, 3] == 0.0, "the first token of the second sequence"
        assert all(getattr(getattr(part, "config", None), "use_cache", True) for part in model.modules())
        torch.testing.assert_close(torch.cat([packed[:, :3], packed[:, 4:]], dim=1), torch.cat(alone, dim=1))


def with_prefix():
    import peft

    return peft.get_peft_model(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


BLIND_TO_PACKING = {
    "Falcon": falcon,
    "Jamba": lambda: tiny(  # attention that keeps them apart, and a state that runs through the row
        "Jamba",
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    "Mamba": lambda: tiny("Mamba", state_size=4),
    "OPT": lambda: tiny("OPT", word_embed_proj_dim=16, ffn_dim=24),
    "prefix": with_prefix,
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", BLIND_TO_PACKING)
def test_packed_sequences_are_refused_where_they_would_see_each_other(fused, kind):
    tokens = ids(1, 10)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    with fake(fused) as strategy:
        model = strategy.prepare(BLIND_TO_PACKING[kind]())
        with pytest.raises(UnsupportedOperationError, match="expected a model that keeps packed sequences apart"):
            strategy.token_log_probs(model, tokens, position_ids=positions)
        strategy.token_log_probs(model, tokens)


def test_a_cache_is_refused_with_packed_sequences():
    with fake() as strategy:
        model = strategy.prepare(llama())
        with pytest.raises(ArgumentError, match="expected no cache with packed sequences, got use_cache=True"):
            strategy.token_log_probs(model, ids(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=True)


@pytest.mark.parametrize("fused", [False, True])
def test_log_probs_do_not_depend_on_padding_on_the_left(fused):
    tokens, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    with fake(fused) as strategy:
        model = strategy.prepare(llama())
        seen = [strategy.token_log_probs(model, tokens.masked_fill(mask == 0, pad), mask).log_probs for pad in (0, 1)]
        assert torch.equal(*seen)
        assert seen[0][0, :3].tolist() == [0.0, 0.0, 0.0]
        alone = strategy.token_log_probs(model, tokens[:1, 3:]).log_probs
        torch.testing.assert_close(seen[0][:1, 3:], alone)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_without_logits_is_refused(fused):
    class NoLogits(Plain):
        def forward(self, input_ids, attention_mask=None):
            return {"scores": super().forward(input_ids)}

    with fake(fused) as strategy, pytest.raises(ArgumentError, match="expected NoLogits to return logits"):
        strategy.token_log_probs(strategy.prepare(NoLogits()), ids())
