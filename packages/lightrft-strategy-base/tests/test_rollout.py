"""The parts of rollouts that can be looked at alone: engines' promises, prompts, drawing."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft.config import ArgumentError, BackendNotInstalledError, ConfigError, EngineError, StaleWeightsError
from lightrft.strategy import (
    Completion,
    EngineBase,
    EngineCapabilities,
    FakeStrategy,
    Prompt,
    RolloutEngine,
    Sampling,
    is_engine,
    registry,
)
from lightrft.strategy.rollout import multimodal
from lightrft.strategy.rollout.embedded import changed_settings
from lightrft.strategy.rollout.engine import checked_buckets, engine_class
from lightrft.strategy.rollout.multimodal import build_prompts, media_by_prompt, prompts_of_tokens
from lightrft.strategy.rollout.sampling import apply_penalties, random_key, sample_tokens, uniform
from lightrft.strategy.strategy import strategy_class


class Small(EngineBase):
    """An engine of two weights."""

    capabilities = EngineCapabilities(sleep_levels=frozenset({1, 2}))
    expected_weights = {"a": torch.Size([2]), "b": torch.Size([3])}

    def __init__(self):
        super().__init__(has_weights=False)
        self.calls = []

    @classmethod
    def build(cls, request):
        return cls()

    def _generate(self, prompts, sampling):
        return [
            Completion(
                prompt_token_ids=(1,),
                output_token_ids=(2,),
                logprobs=None,
                finish_reason="stop",
                weight_version=self.weight_version,
            )
        ]

    def _load(self, buckets):
        for bucket in buckets:
            self.calls.append([name for name, _ in bucket])

    def _sleep(self, level):
        self.calls.append(f"sleep {level}")

    def _wake(self, parts):
        self.calls.append(f"wake {sorted(parts)}")

    def _shutdown(self):
        self.calls.append("shutdown")


A, B = ("a", torch.zeros(2)), ("b", torch.zeros(3))
PROMPT = [Prompt(token_ids=(1,))]


def synced():
    engine = Small()
    engine.update_weights([[A], [B]])
    engine.calls.clear()
    return engine


def test_an_engine_is_an_engine():
    assert is_engine(Small()) and isinstance(Small(), RolloutEngine) and not is_engine(torch.nn.Linear(1, 1))


def test_an_engine_without_weights_does_not_generate():
    with pytest.raises(StaleWeightsError, match="received no weights yet"):
        Small().generate(PROMPT, Sampling())


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ([[A]], r"without 1 of them \(b first\)"),
        ([[A, B], [("c", torch.zeros(1))]], "got c, which is not in it"),
        ([[A, B, A]], "every weight once, got a twice"),
        ([[("a", torch.zeros(3)), B]], r"expected a of shape \(2,\).*got \(3,\)"),
    ],
)
def test_an_incomplete_stream_leaves_the_engine_stale(stream, words):
    engine = synced()
    with pytest.raises(EngineError, match=words):
        engine.update_weights(stream)
    with pytest.raises(StaleWeightsError, match="the last weight sync failed"):
        engine.generate(PROMPT, Sampling())
    assert engine.weight_version == 1
    engine.update_weights([[A, B]])
    assert engine.generate(PROMPT, Sampling())[0].weight_version == 2


def test_an_interrupted_sync_leaves_the_engine_stale():
    engine = synced()

    def interrupted():
        yield [A]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.update_weights(interrupted())
    assert engine.stale


def test_sleep_and_wake_are_idempotent_and_staged():
    engine = synced()
    engine.sleep()
    engine.sleep()
    assert not engine.awake
    with pytest.raises(EngineError, match="asleep"):
        engine.generate(PROMPT, Sampling())
    with pytest.raises(EngineError, match="weights that are asleep"):
        engine.update_weights([[A, B]])
    engine.wake_up(["weights"])
    engine.wake_up(["weights"])
    assert engine.awake == {"weights"}
    engine.wake_up()
    assert engine.calls == ["sleep 1", "wake ['weights']", "wake ['kv_cache']"]
    with pytest.raises(ArgumentError, match="expected parts among"):
        engine.wake_up(["brain"])


def test_a_deeper_sleep_goes_deeper_and_drops_the_weights():
    engine = synced()
    engine.sleep(1)
    engine.sleep(2)
    engine.sleep(2)
    assert engine.calls == ["sleep 1", "sleep 2"]
    engine.wake_up()
    with pytest.raises(StaleWeightsError, match="dropped the weights"):
        engine.generate(PROMPT, Sampling())
    with pytest.raises(EngineError, match=r"sleep levels that this engine supports \(1, 2\), got"):
        engine.sleep(3)


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_that_fails_leaves_the_engine_asleep_and_stale(level):
    engine = synced()
    engine._sleep = lambda level: [][level]
    with pytest.raises(IndexError):
        engine.sleep(level)
    assert engine.awake == frozenset()
    engine.wake_up()
    with pytest.raises(StaleWeightsError, match=rf"sleep\(level={level}\)"):
        engine.generate(PROMPT, Sampling())
    engine.update_weights([[A], [B]])
    assert engine.generate(PROMPT, Sampling())


def test_a_prompt_leaves_room_for_a_token():
    engine = synced()
    engine.max_model_len = 3
    assert engine.generate([Prompt(token_ids=(1, 2))], Sampling())
    with pytest.raises(
        EngineError, match=r"generate: expected prompt 1 to have fewer tokens than max_model_len \(3\), got 3"
    ):
        engine.generate([*PROMPT, Prompt(token_ids=(1, 2, 3))], Sampling())


def test_whatever_building_raises_is_an_error_of_the_engine(monkeypatch):
    monkeypatch.setattr(Small, "build", lambda request: Path("/nowhere/at/all").read_text())
    monkeypatch.setattr("lightrft.strategy.rollout.rollout.engine_class", lambda name: Small)
    with FakeStrategy({}) as strategy, pytest.raises(EngineError, match="Small could not be built: FileNotFoundError"):
        strategy.setup_inference_engine(engine_type="small")


def test_a_shut_down_engine_raises():
    engine = synced()
    engine.shutdown()
    engine.shutdown()
    assert engine.calls == ["shutdown"]
    with pytest.raises(EngineError, match="shut down"):
        engine.generate(PROMPT, Sampling())


def test_an_engine_refuses_unsupported_requests():
    engine = synced()
    with pytest.raises(EngineError, match="expected prompts without images"):
        engine.generate([Prompt(text="x", images=(1,))], Sampling())
    with pytest.raises(EngineError, match="no stop strings"):
        engine.generate(PROMPT, Sampling(stop=("x",)))
    assert engine.generate([], Sampling()) == []


def test_without_known_names_only_repetition_is_refused():
    assert len(list(checked_buckets([[A], [B]], None, "engine"))) == 2
    with pytest.raises(EngineError, match="twice"):
        list(checked_buckets([[A], [A]], None, "engine"))


def test_unknown_engines_and_strategies(monkeypatch):
    installed = registry.entry_points(group="lightrft.engines", name="fake")
    monkeypatch.setattr(registry, "entry_points", lambda group: installed)
    monkeypatch.setattr(registry, "_imported", {})
    with pytest.raises(BackendNotInstalledError, match=r"pip install 'lightrft-engines\[vllm\]'"):
        engine_class("vllm")
    with pytest.raises(ConfigError, match="did you mean 'fake'"):
        engine_class("fakee")
    with pytest.raises(ConfigError, match="expected a subclass of StrategyBase"):
        strategy_class("json:loads")
    with pytest.raises(BackendNotInstalledError, match="cannot be imported"):
        strategy_class("no_such_module:Strategy")


def test_attributes_of_engines_under_their_names_in_version_0_1():
    with pytest.warns(DeprecationWarning, match="Old.longest is called max_model_len"):
        old = type("Old", (Small,), {"longest": 3})
    assert old.max_model_len == 3
    engine = synced()
    with pytest.warns(DeprecationWarning, match="Small.vocabulary is called vocab_size"):
        engine.vocabulary = 5
    assert engine.vocab_size == 5
    with pytest.warns(DeprecationWarning, match="vocab_size"):
        assert engine.vocabulary == 5


# Sampling


class SamplingParams:
    """Like vLLM's."""

    def __init__(self, n=1, max_tokens=16, temperature=1.0, bad_words=None, logprobs=None):
        self.n, self.max_tokens, self.temperature, self.bad_words, self.logprobs = (
            n,
            max_tokens,
            temperature,
            bad_words,
            logprobs,
        )
        self._private = 1


def test_sampling_reads_the_objects_that_trainers_pass():
    assert Sampling.of(None) == Sampling()
    assert Sampling.of({"max_new_tokens": 5, "temperature": 0}) == Sampling(max_tokens=5, temperature=0)
    assert Sampling.of(SamplingParams(n=3, max_tokens=7, logprobs=1)) == Sampling(n=3, max_tokens=7)
    assert Sampling.of({"stop": "x", "stop_token_ids": [1, 2]}) == Sampling(stop=("x",), stop_token_ids=(1, 2))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"), (SamplingParams(bad_words=["x"]), "bad_words"),
        ({"n": 0}, "expected n to be >= 1, got 0"), ({"top_p": 0.0}, "top_p"), ({"stop": [""]}, "stop"), ({"stop": [5]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"presence_penalty": float("nan")}, "presence_penalty"), ({"frequency_penalty": float("inf")}, "frequency_penalty"), ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        (5, "cannot read 5"),
    ],
)  # fmt: skip
def test_sampling_refuses_what_it_cannot_honour(source, words):
    with pytest.raises(ArgumentError, match=words):
        Sampling.of(source)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 99), min_size=1, max_size=5), st.integers(0, 5))
def test_streams_are_uniform_numbers_of_their_own(seed, prompt, sample):
    key = random_key(seed, prompt, sample)
    assert all(0 <= uniform(key, position) < 1 for position in range(4))
    assert key != random_key(seed, prompt, sample + 1) != random_key(seed + 1, prompt, sample + 1)


def test_drawing_follows_the_distribution():
    logits = torch.tensor([[0.0, math.log(3.0), -torch.inf]]).expand(4000, 3)
    numbers = [uniform(random_key(1, [2], row), 0) for row in range(4000)]
    drawn = sample_tokens(logits, Sampling(), numbers)
    assert abs((drawn == 1).float().mean().item() - 0.75) < 0.03 and not (drawn == 2).any()
    assert (sample_tokens(logits, Sampling(temperature=0), numbers) == 1).all()


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"top_k": 2}, {2, 3}), ({"top_p": 0.6}, {3}), ({"top_p": 0.7}, {2, 3}), ({"min_p": 0.5}, {3})],
)
def test_filters_remove_the_documented_tokens(settings, allowed):
    logits = torch.tensor([[0.05, 0.1, 0.2, 0.65]]).log().expand(500, 4)
    drawn = sample_tokens(logits, Sampling(**settings), [uniform(random_key(1, [1], row), 0) for row in range(500)])
    assert set(drawn.tolist()) == allowed


def test_penalties():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    result = apply_penalties(
        logits, [[0]], [[1, 1]], Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    )
    assert torch.allclose(result, torch.tensor([[1.0, -4.0 - 0.5 - 0.5, 1.0]]))


# Prompts


def test_media_nested_or_flat():
    assert media_by_prompt([["a", "b"], None, ["c"]], None, 3, "image") == [("a", "b"), (), ("c",)]
    assert media_by_prompt(["a", "b", "c"], [2, 0, 1], 3, "image") == [("a", "b"), (), ("c",)]
    assert media_by_prompt(["a", None], None, 2, "image") == [("a",), ()]
    assert media_by_prompt([["f1", "f2"], ["f3"]], [1, 1], 2, "video") == [(["f1", "f2"],), (["f3"],)]


def test_one_or_several_lists_of_tokens_in_any_container():
    for one in ([1, 2], (1, 2), torch.tensor([1, 2]), np.array([1, 2]), [np.int64(1), np.int64(2)]):
        assert prompts_of_tokens(one) == [Prompt(token_ids=(1, 2))]
    for two in ([[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]]), [torch.tensor([1, 2]), np.array([3, 4])]):
        assert prompts_of_tokens(two) == [Prompt(token_ids=(1, 2)), Prompt(token_ids=(3, 4))]
    assert prompts_of_tokens(torch.zeros(0, 3)) == []
    with pytest.raises(ArgumentError, match="expected a list of integers"):
        prompts_of_tokens([1.5, 2])


def test_prompts_need_tokens_or_text():
    assert Prompt(token_ids=(), text="a") == Prompt(text="a")
    with pytest.raises(ArgumentError, match="got neither"):
        build_prompts(None, None, None, None, None, None)
    with pytest.raises(ArgumentError, match="expected a list of texts as all_prompts, got one text"):
        build_prompts(None, "text", None, None, None, None)
    with pytest.raises(ArgumentError, match="token_ids or text"):
        Prompt()
    assert build_prompts([torch.tensor([1, 2])], None, None, None, None, None)[0].token_ids == (1, 2)


def test_an_object_of_attributes_that_cannot_be_made_anew_is_refused():
    class Odd:
        def __init__(self, needed):
            self.needed = needed

    with pytest.raises(ArgumentError, match="cannot read"):
        Sampling.of(Odd(1))
    assert Sampling.of(SimpleNamespace(n=2)) == Sampling(n=2)


def test_a_generation_config_means_what_it_means_to_generate() -> None:
    config = pytest.importorskip("transformers").GenerationConfig
    drawn = Sampling.of(config(max_new_tokens=5, do_sample=True, temperature=0.7, top_p=0.9, num_return_sequences=3))
    assert drawn == Sampling(max_tokens=5, temperature=0.7, top_p=0.9, top_k=50, n=3)
    assert Sampling.of(config(max_new_tokens=5, do_sample=True, top_k=0)) == Sampling(max_tokens=5, top_k=0)
    greedy = Sampling(max_tokens=5, temperature=0.0)
    assert Sampling.of(config(max_new_tokens=5, temperature=0.7, top_k=20)) == greedy
    neutral = config(max_new_tokens=5, max_length=512, num_beams=1, pad_token_id=0, use_cache=True, typical_p=1.0)
    assert Sampling.of(neutral) == greedy
    ended = Sampling.of(config(max_new_tokens=5, eos_token_id=[2, 3], stop_strings="x", min_new_tokens=2))
    assert ended == Sampling(
        max_tokens=5, temperature=0.0, stop_token_ids=(2, 3), ignore_eos=True, stop=("x",), min_tokens=2
    )
    for refused, words in [
        ({"num_beams": 4}, "num_beams=4 is not supported"), ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"suppress_tokens": [1]}, "suppress_tokens"), ({"min_length": 3}, "min_length"),
    ]:  # fmt: skip
        with pytest.raises(ArgumentError, match=words):
            Sampling.of(config(max_new_tokens=5, **refused))
    with pytest.raises(ArgumentError, match="Set max_new_tokens"):
        Sampling.of(config(max_length=50))


def test_prompts_are_read_from_a_tokenizers_output_and_from_generators() -> None:
    encoded = pytest.importorskip("transformers").BatchEncoding
    wanted = [Prompt(token_ids=(1, 2, 3)), Prompt(token_ids=(4,))]
    padded = {"input_ids": [[1, 2, 3], [0, 0, 4]], "attention_mask": [[1, 1, 1], [0, 0, 1]]}
    tensors = encoded({name: torch.tensor(rows) for name, rows in padded.items()})
    ragged = encoded({"input_ids": [[1, 2, 3], [4]]})
    each = [{"input_ids": [1, 2, 3]}, encoded({"input_ids": [0, 4], "attention_mask": [0, 1]})]
    for source in (padded, encoded(padded), tensors, ragged, each, iter([[1, 2, 3], [4]]), iter(each)):
        again = list(source) if isinstance(source, Iterator) else source
        assert multimodal.build_prompts(iter(again) if isinstance(source, Iterator) else source, *[None] * 5) == wanted
        assert multimodal.prompts_of_tokens(iter(again) if isinstance(source, Iterator) else source) == wanted
    (single,) = multimodal.prompts_of_tokens(encoded({"input_ids": [1, 2], "attention_mask": [1, 1]}))
    assert single == Prompt(token_ids=(1, 2))
    texts = multimodal.build_prompts(None, (text for text in "ab"), *[None] * 4)
    assert [prompt.text for prompt in texts] == ["a", "b"]
    for wrong, words in [
        ({"ids": [1]}, "without input_ids: ids"),
        ("text", "Pass it as all_prompts"),
        ({1, 2}, "got a set"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            multimodal.build_prompts(wrong, *[None] * 5)
    with pytest.raises(ArgumentError, match="expected strings as all_prompts, got a list"):
        multimodal.build_prompts(None, [[1, 2]], *[None] * 4)


@pytest.mark.parametrize(("before", "after", "changed"), [
    (1.2, None, "repetition_penalty=None"), (None, 1.2, "repetition_penalty=1.2"), (1.2, 1.2, ""), (None, None, ""),
])  # fmt: skip
def test_generation_settings_changed_after_prepare_are_named(before, after, changed) -> None:
    transformers = pytest.importorskip("transformers")
    models = [torch.nn.Linear(1, 1) for _ in range(2)]
    for model, penalty, end in zip(models, (after, before), ([3], [2]), strict=True):
        model.generation_config = transformers.GenerationConfig(repetition_penalty=penalty, eos_token_id=end)
    assert changed_settings(*models) == changed
