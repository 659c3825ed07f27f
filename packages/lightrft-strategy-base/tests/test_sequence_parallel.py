"""What sequence parallelism does without a second rank: identity, the layout of masks, refusals."""

import copy
from typing import Any

import pytest
import sequences
import torch
from llamas import llama, transformers, with_adapter
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lightrft.config import ConfigError, StrategyError, UnsupportedOperationError
from lightrft.strategy import FakeStrategy
from lightrft.strategy.parallel import attention, exchange
from lightrft.strategy.parallel.attention import Layout
from lightrft.strategy.parallel.model_checks import check_model
from lightrft.strategy.parallel.sequence import SequenceParallel


def test_one_rank_gets_its_own_arguments_back() -> None:
    with FakeStrategy(device="cpu") as strategy:
        ranks, processor, batch, data = (
            strategy.sequence_parallel,
            strategy.sp_data_processor,
            {"a": torch.ones(1)},
            object(),
        )
        assert (ranks.size, ranks.rank, ranks.data_ranks, ranks.data_rank, ranks.group) == (1, 0, 1, 0, None)
        assert ranks.split(batch) is batch
        assert ranks.gather(batch["a"]) is batch["a"]
        assert processor.preprocess(data) is data  # type: ignore[type-var]
        assert processor.postprocess(data) is data  # type: ignore[type-var]


def test_embeddings_may_come_with_input_ids_of_none() -> None:
    ranks = SequenceParallel.__new__(SequenceParallel)  # without the group of two ranks, which slicing does not need
    ranks.size, ranks.rank, ranks._splits = 2, 1, []
    embeds_BSH = torch.randn(1, 3, 2)
    local = ranks._slices({"input_ids": None, "inputs_embeds": embeds_BSH}, embeds_BSH)
    assert torch.equal(local["inputs_embeds"][:, 0], embeds_BSH[:, 2])
    assert local["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert ranks.use_split(local["inputs_embeds"])


def test_one_process_cannot_share_sequences() -> None:
    with pytest.raises(ConfigError, match=r"sp_size=2: expected a divisor of the number of ranks, got 1 ranks"):
        FakeStrategy(device="cpu", sp_size=2)


@pytest.mark.parametrize(
    ("rows", "needs_mask", "packed"),
    [
        ([[1, 1, 1, 1]], False, False),
        ([[1, 1, 1, 0]], False, False),  # what split adds
        ([[1, 1, 0, 0]], True, False),  # more than split adds for two ranks
        ([[1, 1, 1, 0], [1, 1, 1, 1]], True, False),
        ([[0, 1, 1, 1]], True, False),
        ([[1, 1, 2, 2]], False, True),
        ([[1, 2, 2, 0]], False, True),
    ],
)
def test_a_mask_is_left_out_where_causality_suffices(rows: list[list[int]], needs_mask: bool, packed: bool) -> None:
    layout = Layout.of(torch.tensor(rows), ranks=2)
    assert (layout.padding is not None, layout.segments is not None) == (needs_mask, packed)


def _changed(**settings: Any) -> nn.Module:
    config = copy.deepcopy(llama().config)
    for name, value in settings.items():
        setattr(config, name, value)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def _prompt_tuned() -> nn.Module:
    import peft

    tuned: nn.Module = peft.get_peft_model(
        llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    return tuned


def _encoder_decoder() -> nn.Module:
    config = transformers.T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model: nn.Module = transformers.T5ForConditionalGeneration(config)
    return model


def _with_sinks() -> nn.Module:
    model = llama()
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "ranks", "words"),
    [
        (lambda: nn.Linear(2, 2), 2, ["sp_size=2", "transformers", "Linear"]),
        (llama, 5, ["sp_size=5", "at least 5 attention heads", "got 4", "LlamaForCausalLM"]),
        (lambda: _changed(layer_types=["linear_attention", "full_attention"]), 2, ["1 of linear_attention"]),
        (_with_sinks, 2, ["1 parameters such as", "self_attn.sinks"]),
        (lambda: _changed(attn_logit_softcapping=30.0), 2, ["attn_logit_softcapping=30.0"]),
        (lambda: _changed(output_router_logits=True), 2, ["output_router_logits"]),
        (_prompt_tuned, 2, ["prompt learning"]),
        (_encoder_decoder, 2, ["a text-only decoder"]),
    ],
)
def test_a_model_whose_attention_cannot_be_shared_is_refused_with_the_numbers(
    build: Any, ranks: int, words: list[str]
) -> None:
    with pytest.raises(UnsupportedOperationError) as raised:
        check_model(build(), ranks)
    assert [word for word in words if word not in str(raised.value)] == []


def test_models_that_can_share_are_accepted() -> None:
    for ranks in (2, 3, 4):
        check_model(llama(), ranks)
        check_model(with_adapter(), ranks)


@pytest.mark.parametrize(
    ("heads", "groups", "ranks", "expected"),
    [
        (4, 4, 2, (4, 4)), (4, 2, 2, (4, 2)), (4, 1, 2, (4, 2)), (12, 4, 8, (16, 16)), (24, 6, 4, (24, 12)),
        (9, 3, 2, (10, 10)), (9, 3, 3, (9, 3)), (9, 3, 4, (12, 4)), (5, 5, 4, (8, 8)), (14, 2, 4, (16, 16)),
    ],
)  # fmt: skip
def test_heads_are_repeated_and_added_as_seldom_as_possible(
    heads: int, groups: int, ranks: int, expected: tuple[int, int]
) -> None:
    query, key = torch.randn(1, heads, 3, 2), torch.randn(1, groups, 3, 2)
    queries, keys, values = attention.divisible_heads(query, key, -key, ranks)
    assert (queries.shape[1], keys.shape[1]) == expected
    assert torch.equal(values, -keys)
    wanted = scaled_dot_product_attention(query, key, -key, enable_gqa=True)
    parts = [tensor.chunk(ranks, dim=1) for tensor in (queries, keys, values)]
    found = torch.cat(
        [scaled_dot_product_attention(*part, enable_gqa=True) for part in zip(*parts, strict=True)], dim=1
    )
    torch.testing.assert_close(found[:, :heads], wanted)
    assert not found[:, heads:].any()


def test_heads_that_divide_are_not_copied() -> None:
    tensors = torch.randn(1, 4, 3, 2), torch.randn(1, 2, 3, 2), torch.randn(1, 2, 3, 2)
    assert all(same is tensor for same, tensor in zip(attention.divisible_heads(*tensors, 2), tensors, strict=True))


@pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="needs transformers 4")
def test_version_4_of_transformers_is_refused_by_name() -> None:
    with pytest.raises(
        StrategyError, match=r"sp_size expected transformers>=5.10,<6, got .* 4\.57.*sdpa_mask has no parameter"
    ):
        attention.register()


@sequences.of_version_5
def test_a_model_that_only_names_the_attention_computes_as_before() -> None:
    tokens = torch.tensor([[0, 3, 4, 5]])
    model = llama().eval()
    with torch.no_grad():
        wanted = model(tokens, attention_mask=(tokens != 0).long()).logits
        attention.register()
        model.set_attn_implementation(attention.NAME)
        assert torch.equal(model(tokens, attention_mask=(tokens != 0).long()).logits, wanted)


def test_a_version_of_transformers_without_a_target_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.masking_utils.packed_sequence_mask_function")
    with pytest.raises(StrategyError, match=r"sp_size expected transformers>=5.10,<6.*packed_sequence_mask_function"):
        attention.register()


def test_a_loss_that_uses_no_model_output_passes_the_check() -> None:
    weight = torch.ones(3, requires_grad=True)
    exchange.check_gathered((weight * 2).sum())
    exchange.check_gathered(1.0)  # type: ignore[arg-type]  # `backward` refuses it
