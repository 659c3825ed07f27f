"""The engine in the training process: what it generates is what its model says."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
from engine_cases import many_cycles_leave_nothing_behind, resident
from llamas import llama
from torch import nn

from lightrft.config import ConfigError, EngineError, StaleWeightsError
from lightrft.engines.transformers import TransformersEngine
from lightrft.strategy import Completion, FakeStrategy, Sampling

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

RAGGED = [[1, 5, 9], [4], [1, 2, 3, 4, 5, 6, 7], [11, 3]]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@contextmanager
def rollout(actor: Any = None, **settings: Any) -> Iterator[tuple[FakeStrategy, Any]]:
    """A strategy with the engine, and an actor whose weights it has."""
    config = {"engine_type": "transformers", "bf16": False, "train_batch_size": 1, **settings}
    with FakeStrategy(config) as strategy:
        actor = llama() if actor is None else actor
        actor, _, _ = strategy.prepare((actor, strategy.create_optimizer(actor, lr=0.1), None))
        strategy.setup_inference_engine(strategy.config, "transformers", actor=actor)
        yield strategy, actor


def completed(strategy: FakeStrategy, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Completion]:
    completions: list[Completion] = strategy.gather_and_generate(sampling, prompts)
    return completions


def tokens(completions: Sequence[Completion]) -> list[tuple[int, ...]]:
    return [completion.output_token_ids for completion in completions]


def test_greedy_tokens_of_ragged_prompts_are_those_of_transformers_own_generate() -> None:
    with rollout() as (strategy, actor):
        completions = completed(strategy, RAGGED, **GREEDY)
        for prompt, completion in zip(RAGGED, completions, strict=True):
            config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
            wanted = actor.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
            assert completion.prompt_token_ids == tuple(prompt)
            assert completion.output_token_ids == tuple(wanted.tolist())
            assert completion.finish_reason == "length"


def test_logprobs_are_the_models_own_before_temperature_and_filters() -> None:
    with rollout() as (strategy, actor):
        for completion in completed(strategy, RAGGED, n=2, temperature=0.5, top_k=5, max_tokens=6, seed=1):
            tokens_1T = torch.tensor([[*completion.prompt_token_ids, *completion.output_token_ids]])
            with torch.no_grad():
                logprobs_TV = actor(tokens_1T).logits[0].log_softmax(dim=-1)
            positions = range(len(completion.prompt_token_ids) - 1, tokens_1T.shape[1] - 1)
            wanted = [logprobs_TV[position, tokens_1T[0, position + 1]].item() for position in positions]
            assert completion.logprobs == pytest.approx(wanted, abs=1e-5)


def test_samples_of_a_prompt_come_in_a_row_and_differ() -> None:
    with rollout() as (strategy, _):
        completions = completed(strategy, RAGGED, n=4, temperature=1.0, max_tokens=8, ignore_eos=True, seed=3)
    assert [completion.prompt_token_ids for completion in completions] == [
        tuple(prompt) for prompt in RAGGED for _ in range(4)
    ]
    assert len(set(tokens(completions))) == 16


def test_with_a_seed_a_completion_depends_on_its_prompt_and_number_alone() -> None:
    sampling = {"n": 3, "temperature": 1.0, "max_tokens": 8, "seed": 5}
    with rollout() as (strategy, _):
        together = completed(strategy, RAGGED, **sampling)
        apart = [completion for prompt in RAGGED for completion in completed(strategy, [prompt], **sampling)]
        other = completed(strategy, RAGGED, **{**sampling, "seed": 6})
    with rollout(engine_max_sequences=6) as (strategy, _):
        in_pieces = completed(strategy, RAGGED, **sampling)
    assert tokens(together) == tokens(apart) == tokens(in_pieces)
    assert tokens(together) != tokens(other)
    assert len({len(output) for output in tokens(together)}) > 1, "rows end at different times, and leave the batch"


def test_without_a_seed_calls_differ_and_runs_repeat() -> None:
    def run(seed: int) -> list[list[tuple[int, ...]]]:
        with rollout(seed=seed) as (strategy, _):
            return [tokens(completed(strategy, RAGGED, temperature=1.0, max_tokens=8)) for _ in range(2)]

    first, again, other = run(1), run(1), run(2)
    assert first == again
    assert first != other
    assert first[0] != first[1]


def test_it_stops_at_end_and_stop_tokens_but_not_before_the_minimum() -> None:
    with rollout() as (strategy, actor):
        (unstopped,) = tokens(completed(strategy, [[1, 5, 9]], **GREEDY))
        stop = unstopped[2]
        first = unstopped.index(stop) + 1
        (stopped,) = completed(strategy, [[1, 5, 9]], **GREEDY, stop_token_ids=[stop])
        (later,) = completed(strategy, [[1, 5, 9]], **GREEDY, stop_token_ids=[stop], min_tokens=5)
        actor.generation_config.eos_token_id = stop
        strategy.update_engine_weights(actor)
        (ended,) = completed(strategy, [[1, 5, 9]], **{**GREEDY, "ignore_eos": False})
        (ignored,) = completed(strategy, [[1, 5, 9]], **GREEDY)
    assert (stopped.output_token_ids, stopped.finish_reason) == (unstopped[:first], "stop")
    assert (ended.output_token_ids, ended.finish_reason) == (unstopped[:first], "stop")
    assert stop not in later.output_token_ids[:4]
    assert len(later.output_token_ids) >= 5
    assert (ignored.output_token_ids, ignored.finish_reason) == (unstopped, "length")


def test_end_tokens_set_after_preparing_mean_the_same_in_engine_and_export(tmp_path: Path) -> None:
    with FakeStrategy({"bf16": False}) as strategy:
        actor, _, _ = strategy.prepare((model := llama(), strategy.create_optimizer(model, lr=0.1), None))
        actor.generation_config.eos_token_id, actor.config.eos_token_id = [1, 3], 5
        strategy.setup_inference_engine(strategy.config, "transformers", actor=actor)
        assert strategy.inference_engine.eos_token_ids == {1, 3, 5}
        actor.generation_config.eos_token_id, actor.config.eos_token_id = 7, None
        assert strategy.inference_engine.eos_token_ids == {1, 3, 5}, "as the weights: those of the last sync"
        strategy.update_engine_weights(actor)
        ended = completed(strategy, RAGGED, n=8, max_tokens=20, seed=1)
        assert {completion.output_token_ids[-1] for completion in ended if completion.finish_reason == "stop"} == {7}
        strategy.save_model(actor, None, tmp_path)
    with FakeStrategy({"bf16": False, "pretrain": str(tmp_path)}) as strategy:
        strategy.setup_inference_engine(engine_type="transformers")
        assert strategy.inference_engine.eos_token_ids == {7}
        assert tokens(completed(strategy, RAGGED, n=8, max_tokens=20, seed=1)) == tokens(ended)


TINY = {
    "vocab_size": 17, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MAMBA_LAYER = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 32},
    "bamba": {**MAMBA_LAYER, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "qwen3_next": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "chunk_size": 8,
        "adapter_rank": 4,
        "num_mem_blocks": 1,
    },
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "bert": {"is_decoder": False, "pad_token_id": 0},
    "mistral": {"sliding_window": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
}
"""Models that remember in other ways than by keys and values alone, place tokens in other ways, look ahead, or report more."""


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_equal_those_of_full_forward_passes(kind: str) -> None:
    torch.manual_seed(3)
    config = transformers.CONFIG_MAPPING[kind](**{**TINY, **MODELS[kind]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    sampling = {"n": 2, "temperature": 1.0, "max_tokens": 8, "seed": 3, "stop_token_ids": [2, 7]}
    with rollout(model) as (strategy, actor):
        completions = completed(strategy, RAGGED, **sampling)
        again = completed(strategy, RAGGED, **sampling)
        assert actor.config.to_dict().get("output_router_logits", False) == MODELS[kind].get(
            "output_router_logits", False
        )
        strategy.setup_inference_engine(engine_type="fake", actor=actor)
        wanted = completed(strategy, RAGGED, **sampling)
    assert tokens(completions) == tokens(wanted)
    assert tokens(again) == tokens(wanted), "no state is left from the call before"
    for completion, other in zip(completions, wanted, strict=True):
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("engine", ["transformers", "fake"])
def test_encoder_decoders_are_refused_when_the_engine_is_set_up(engine: str, tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=17, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    with FakeStrategy({"bf16": False}) as strategy:
        actor, _, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.1), None))
        with pytest.raises(EngineError, match=r"decoder-only model, got an encoder-decoder \(t5\)"):
            strategy.setup_inference_engine(strategy.config, engine, actor=actor)
    if engine == "transformers":
        with (
            FakeStrategy({"bf16": False, "pretrain": str(tmp_path)}) as strategy,
            pytest.raises(EngineError, match="t5"),
        ):
            strategy.setup_inference_engine(engine_type=engine)


def test_it_generates_from_the_weights_of_the_last_sync_in_the_memory_it_has() -> None:
    with rollout() as (strategy, actor):
        addresses = [parameter.data_ptr() for parameter in strategy.inference_engine._model.module.parameters()]
        old = completed(strategy, RAGGED, **GREEDY)
        with torch.no_grad():
            for parameter in actor.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        assert tokens(completed(strategy, RAGGED, **GREEDY)) == tokens(old)
        strategy.update_engine_weights(actor)
        new = completed(strategy, RAGGED, **GREEDY)
        assert tokens(new) != tokens(old)
        assert {completion.weight_version for completion in old} == {1}
        assert {completion.weight_version for completion in new} == {2}
        assert [parameter.data_ptr() for parameter in strategy.inference_engine._model.module.parameters()] == addresses
        assert addresses[0] != next(actor.parameters()).data_ptr()


def test_sleep_frees_the_weights_and_a_sync_restores_them() -> None:
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8
    )
    with rollout(transformers.LlamaForCausalLM(config)) as (strategy, actor):
        size = sum(parameter.nbytes for parameter in actor.parameters())
        wanted = tokens(completed(strategy, [[1, 5]], **GREEDY))
        awake = resident(os.getpid())
        strategy.inference_engine.sleep(2)
        assert awake - resident(os.getpid()) > 0.95 * size
        with pytest.raises(StaleWeightsError, match="dropped the weights"):
            completed(strategy, [[1, 5]], **GREEDY)
        strategy.update_engine_weights(actor)
        assert tokens(completed(strategy, [[1, 5]], **GREEDY)) == wanted
        strategy.inference_engine.sleep(1)
        assert tokens(completed(strategy, [[1, 5]], **GREEDY)) == wanted


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with rollout(engine_cases.llama()) as (strategy, _):
        engine_cases.refuses_unknown_tokens(strategy)


def test_sequences_end_with_the_context() -> None:
    with rollout(engine_cases.llama()) as (strategy, _):
        engine_cases.sequences_end_with_the_context(strategy)


def test_settings_and_threads() -> None:
    with rollout(engine_cases.llama()) as (strategy, actor):
        engine_cases.settings_agree_with_a_plain_loop(strategy, actor)
        engine_cases.threads_take_turns(strategy)


def test_a_tokenizer_adds_nothing_to_text_and_ends_completions(tmp_path: Path) -> None:
    with rollout(engine_cases.llama(), pretrain=engine_cases.with_tokenizer_that_adds(tmp_path)) as (strategy, _):
        engine_cases.adds_no_special_tokens(strategy)
        engine_cases.ends_at_the_tokenizers_eos(strategy)


def test_many_cycles_leak_nothing() -> None:
    with rollout(enable_engine_sleep=True) as made:
        many_cycles_leave_nothing_behind(*made)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model directory, with a tokenizer of a token a letter."""
    llama().save_pretrained(tmp_path)
    vocabulary = {letter: index for index, letter in enumerate("abcdefghijklmnopq")}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    return tmp_path


def test_an_engine_from_a_directory_needs_no_actor_and_takes_text(saved: Path) -> None:
    with FakeStrategy({"bf16": False, "pretrain": str(saved)}) as strategy:
        strategy.setup_inference_engine(engine_type="transformers")
        (by_text,) = strategy.gather_and_generate(GREEDY, all_prompts=["bfj"])
        (by_tokens,) = strategy.gather_and_generate(GREEDY, [[1, 5, 9]])
    assert by_text == by_tokens
    assert by_text.weight_version == 0
    assert by_text.text.replace(" ", "") == "".join("abcdefghijklmnopq"[token] for token in by_text.output_token_ids)


def test_unsupported_requests_are_explained(tmp_path: Path) -> None:
    with rollout() as (strategy, _):
        with pytest.raises(
            EngineError, match=r"expected token ids, got text and has no tokenizer for it\. Pass token ids"
        ):
            strategy.gather_and_generate(GREEDY, all_prompts=["text"])
        with pytest.raises(EngineError, match="expected prompts without images"):
            strategy.gather_and_generate(GREEDY, all_prompts=["<image>"], all_images=[["picture"]])
        with pytest.raises(EngineError, match="stop"):
            completed(strategy, [[1]], **GREEDY, stop=["end"])
        with pytest.raises(ConfigError, match="engine_arguments: expected none for engine 'transformers'"):
            strategy.setup_inference_engine({"engine_arguments": {"x": 1}}, engine_type="transformers")
        with pytest.raises(EngineError, match=r"expected a model or an actor, got neither\. Pass"):
            strategy.setup_inference_engine(engine_type="transformers")
    with (
        pytest.raises(EngineError, match=r"expected a transformers model as actor, got a Linear\. Use engine 'fake'"),
        rollout(nn.Linear(2, 2)),
    ):
        pass


def test_an_empty_list_of_prompts_gives_an_empty_list() -> None:
    with rollout() as (strategy, _):
        assert completed(strategy, [], **GREEDY) == []
        engine = strategy.inference_engine
        assert isinstance(engine, TransformersEngine)
        assert engine.generate([], Sampling()) == []
