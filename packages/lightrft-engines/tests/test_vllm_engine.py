"""vLLM itself, with small models: what it generates, what a sync does to it, and what it leaves alone."""

import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm

pytest.importorskip("vllm", reason="needs the engine vllm")

import engine_cases
from engine_cases import (
    CACHE,
    GREEDY,
    PROMPTS,
    adds_no_special_tokens,
    compare,
    ends_at_the_tokenizers_eos,
    experts,
    fail_on_one_rank,
    interrupted,
    llama,
    many_cycles_leave_nothing_behind,
    prompts_draw_independently,
    refuses_unknown_tokens,
    sequences_end_with_the_context,
    settings_agree_with_a_plain_loop,
    threads_take_turns,
    train,
    trained_copy,
    uniform_model,
    with_tokenizer_that_adds,
)
from tiny_vision import IMAGE, VIDEO, picture, save
from workers import two

from lightrft.config import ConfigError, EngineError, StaleWeightsError
from lightrft.engines.vllm import patches, reload
from lightrft.strategy import get_fake_strategy, get_strategy

__all__ = ["two"]

tqdm.tqdm.monitor_interval = 0  # or it starts a thread
pytestmark = pytest.mark.filterwarnings("ignore", r"error:::lightrft\.")
"""Warnings that vLLM and what it imports give are theirs."""

LONG = {"temperature": 0.0, "max_tokens": 100}
rollout = partial(engine_cases.rollout, "vllm")
sync_and_compare = partial(engine_cases.sync_and_compare, "vllm")


@pytest.fixture(scope="module")
def running():
    """A strategy, a model in training, and vLLM with its weights."""
    with rollout(weight_sync_bucket_bytes=4096, weight_sync_verify="checksum") as running:
        yield running


@pytest.fixture
def made(running):
    return running[0]


def tokens_of(completions):
    return [completion.output_token_ids for completion in completions]


# What is the training's


def test_the_state_of_the_training_process_does_not_change(running):
    made, actor, _ = running
    outside = [name for name in os.environ if name.startswith("VLLM_")]
    streams = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    made.gather_and_generate({"temperature": 1.0, "max_tokens": 4}, PROMPTS)
    made.update_engine_weights(actor)
    assert streams == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert not outside
    assert not torch.distributed.is_initialized()
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"


def test_a_process_can_have_one_engine(made):
    with pytest.raises(EngineError, match="expected no other vLLM engine in this process"), rollout():
        pass
    assert len(made.gather_and_generate(GREEDY, PROMPTS)) == 3


def test_sleeping_on_a_cpu_is_refused(made):
    assert made.inference_engine.capabilities.sleep_levels == frozenset()
    with pytest.raises(EngineError, match=r"sleep levels that this engine supports \(none\), got 1"):
        made.inference_engine.sleep(1)


# Generation


def test_a_seed_is_reproducible_and_its_samples_differ(made):
    assert len(set(tokens_of(made.gather_and_generate({**GREEDY, "n": 3}, [[4]])))) == 1
    sampling = {"temperature": 1.0, "max_tokens": 6, "n": 3, "seed": 11, "top_p": 0.9}
    drawn = tokens_of(made.gather_and_generate(sampling, PROMPTS))
    assert len(drawn) == 9
    assert len(set(drawn)) > 6
    assert tokens_of(made.gather_and_generate(sampling, PROMPTS)) == drawn
    assert tokens_of(made.gather_and_generate({**sampling, "seed": 12}, PROMPTS)) != drawn
    free = {**sampling, "seed": None}
    assert tokens_of(made.gather_and_generate(free, PROMPTS)) != tokens_of(made.gather_and_generate(free, PROMPTS))


def test_a_completion_ends_with_the_token_that_stopped_it(made):
    (plain,) = made.gather_and_generate(LONG, [[5, 6]])
    assert (plain.finish_reason, len(plain.output_token_ids)) == ("length", 100)
    end = plain.output_token_ids[2]
    (stopped,) = made.gather_and_generate({**LONG, "stop_token_ids": [end]}, [[5, 6]])
    first = plain.output_token_ids.index(end)
    assert stopped.finish_reason == "stop"
    assert stopped.output_token_ids == plain.output_token_ids[: first + 1]


def test_log_probabilities_are_the_models_own_under_temperature_and_penalties(running):
    made, actor, _ = running
    reference = trained_copy(made, actor, llama())
    sampling = {"temperature": 1.7, "max_tokens": 5, "seed": 3}
    for more in ({"repetition_penalty": 1.5, "presence_penalty": 0.5}, {"top_k": 5}):
        (completion,) = made.gather_and_generate({**sampling, **more}, [[3, 4, 5]])
        with torch.no_grad():
            rows = reference(torch.tensor([[3, 4, 5, *completion.output_token_ids]])).logits[0, 2:-1].log_softmax(-1)
        assert torch.allclose(
            torch.tensor(completion.logprobs), rows[range(5), list(completion.output_token_ids)], atol=1e-4
        )


def test_sequences_end_with_the_context(made):
    sequences_end_with_the_context(made)


def test_settings_agree_with_a_plain_loop(running):
    settings_agree_with_a_plain_loop(*running[:2])


def test_threads_take_turns(made):
    threads_take_turns(made)


def test_an_interrupted_call_does_not_affect_the_next(made):
    wanted = tokens_of(made.gather_and_generate(GREEDY, PROMPTS))
    with interrupted(0.7):
        _generate_without_end(made)
    assert tokens_of(made.gather_and_generate(GREEDY, PROMPTS)) == wanted


def test_a_sync_after_an_interrupted_call_keeps_the_engine(running):
    made, actor, _ = running
    llm = made.inference_engine._llm
    with interrupted(0.7):
        _generate_without_end(made)
    made.update_engine_weights(actor)
    assert made.inference_engine._llm is llm
    compare(made, trained_copy(made, actor, llama()), PROMPTS)


def test_the_call_after_an_interruption_at_any_point_is_correct(running):
    made, actor, _ = running
    made.update_engine_weights(actor)
    reference, numbers = trained_copy(made, actor, llama()), random.Random(0)
    for _ in range(25):
        prompts = [[numbers.randrange(48) for _ in range(numbers.randrange(1, 400))] for _ in range(4)]
        with interrupted(numbers.uniform(0.001, 0.08)):
            while True:
                made.gather_and_generate({**LONG, "max_tokens": 20}, prompts)
        compare(made, reference, [prompt[:60] for prompt in prompts])


def test_after_a_failed_step_the_next_sync_makes_a_new_engine(running, monkeypatch):
    made, actor, _ = running
    core = made.inference_engine._llm.llm_engine.engine_core
    monkeypatch.setattr(core, "get_output", lambda: [][0])
    with pytest.raises(EngineError, match="could not generate: IndexError"):
        made.gather_and_generate(GREEDY, PROMPTS)
    monkeypatch.undo()
    with pytest.raises(StaleWeightsError, match="in the middle of a step"):
        made.gather_and_generate(GREEDY, PROMPTS)
    made.update_engine_weights(actor)
    assert made.inference_engine._llm.llm_engine.engine_core is not core
    compare(made, trained_copy(made, actor, llama()), PROMPTS)


def test_tokens_outside_the_vocabulary_are_refused(made):
    refuses_unknown_tokens(made)


def _generate_without_end(made):
    while True:
        made.gather_and_generate({**LONG, "temperature": 1.0, "n": 16}, PROMPTS)


# Weights


def test_each_sync_brings_the_weights_in_training(running):
    made, actor, optimizer = running
    before = tokens_of(made.gather_and_generate(GREEDY, PROMPTS))
    for _ in range(2):
        train(made, actor, optimizer, updates=4)
        made.update_engine_weights(actor)
        compare(made, trained_copy(made, actor, llama()), PROMPTS)
    assert tokens_of(made.gather_and_generate(GREEDY, PROMPTS)) != before


def test_caches_are_cleared_with_the_weights(running):
    made, actor, optimizer = running
    long = [[number % 40 for number in range(300)]]  # more than a block of the prefix cache
    compare(made, trained_copy(made, actor, llama()), long)
    compare(made, trained_copy(made, actor, llama()), long)
    train(made, actor, optimizer, updates=4)
    made.update_engine_weights(actor)
    compare(made, trained_copy(made, actor, llama()), long)


@pytest.mark.parametrize("dies", ["before its end", "with a weight missing"])
def test_a_failed_stream_makes_it_stale_until_the_next_sync_makes_a_new_engine(running, dies):
    made, actor, optimizer = running
    engine, old, version = made.inference_engine, made.inference_engine._llm, made.inference_engine.weight_version
    buckets = [[(name, tensor.clone()) for name, tensor in bucket] for bucket in made.full_parameters(actor)]

    def dying():
        yield from buckets[:3]
        raise OSError("the stream died")

    stream, error = (dying(), OSError) if dies == "before its end" else (buckets[:-1], EngineError)
    with pytest.raises(error, match=r"the stream died|a stream without"):
        engine.update_weights(stream)
    with pytest.raises(StaleWeightsError):
        made.gather_and_generate(GREEDY, PROMPTS)
    train(made, actor, optimizer)
    made.update_engine_weights(actor)
    assert engine._llm is not old
    assert engine.weight_version == version + 1
    compare(made, trained_copy(made, actor, llama()), PROMPTS)


def test_weights_that_differ_from_those_sent_are_an_error(running, monkeypatch):
    made, actor, _ = running
    monkeypatch.setattr(patches, "layers_with_tied_weights", lambda model: [])
    made.update_engine_weights(actor)  # the tied head itself arrives: only its packed copy is old
    monkeypatch.setattr("lightrft.engines.vllm.engine.reload", _reload_and_change)
    with pytest.raises(EngineError, match=r"got others in 1 layers \(layers\.1 first\)"):
        made.update_engine_weights(actor)
    monkeypatch.undo()
    made.update_engine_weights(actor)
    compare(made, trained_copy(made, actor, llama()), PROMPTS)


def _reload_and_change(llm, tensors):
    reload.reload(
        llm,
        ((name, 2 * tensor if name == "model.layers.1.mlp.down_proj.weight" else tensor) for name, tensor in tensors),
    )


def test_many_cycles_leak_nothing(running):
    many_cycles_leave_nothing_behind(*running[:2])


# Other engines in this process: after the one above is gone


@pytest.fixture(scope="module")
def room(running):
    """The process without an engine."""
    running[0]._rollout.shutdown()


@pytest.mark.usefixtures("room")
def test_checksums_are_computed_in_the_engines_dtype():
    with get_strategy({"strategy": "fake", "bf16": False, "train_batch_size": 1}) as strategy:
        actor = llama()
        actor, _, _ = strategy.prepare((actor, strategy.create_optimizer(actor, lr=1e-3), None))
        settings = {"engine_kv_cache_bytes": CACHE, "weight_sync_verify": "checksum"}
        engine = strategy.setup_inference_engine({"bf16": True, **settings}, "vllm", actor=actor)
        assert engine.weight_version == 1
        assert strategy.gather_and_generate(GREEDY, PROMPTS)


@pytest.mark.usefixtures("room")
def test_a_tokenizer_adds_nothing_to_text_and_ends_completions(tmp_path):
    with rollout(pretrain=with_tokenizer_that_adds(tmp_path)) as (made, *_):
        adds_no_special_tokens(made)
        ends_at_the_tokenizers_eos(made)


@pytest.mark.usefixtures("room")
def test_prompts_with_the_same_seed_get_different_draws():
    with rollout(model=uniform_model()) as (made, *_):
        prompts_draw_independently(made)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize(
    ("settings", "words"),
    [({"enable_engine_sleep": True}, "enable_engine_sleep: expected False for vLLM on a CPU"),
     ({"weight_sync_verify": "crc"}, "weight_sync_verify: expected 'checksum'")],
)  # fmt: skip
def test_a_setting_that_cannot_be_honoured_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words), rollout(**settings):
        pass


@pytest.mark.usefixtures("room")
def test_a_model_that_vllm_cannot_run_is_an_error_and_leaves_room_for_another(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchForCausalLM"]}')
    before = dict(os.environ)
    with pytest.raises(EngineError, match="vLLM could not start"), rollout(pretrain=str(tmp_path)):
        pass
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()
    assert sync_and_compare("fake", lambda: llama(tied=False)) == 3


@pytest.mark.usefixtures("room")
def test_experts_are_streamed_under_their_names_on_disk():
    assert sync_and_compare("fake", experts, weight_sync_verify="checksum") == 3


@pytest.mark.usefixtures("room")
def test_a_model_from_disk_begins_with_its_weights(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    with rollout(model=llama(7), pretrain=str(tmp_path)) as (made, actor, _):
        compare(made, trained_copy(made, actor, llama()), PROMPTS)
        made.setup_inference_engine({"pretrain": str(tmp_path), "bf16": False, "engine_kv_cache_bytes": 2**24}, "vllm")
        assert made.inference_engine.weight_version == 0
        compare(made, model.eval(), PROMPTS)


@pytest.mark.usefixtures("room")
def test_images_and_videos_reach_the_model_after_a_sync(tmp_path):
    import tiny_vision

    path = save(tmp_path)
    actor = tiny_vision.model().train()
    limits = {"limit_mm_image_per_prompt": 2, "limit_mm_video_per_prompt": 1}
    texts = [f"what is {IMAGE} and {IMAGE} ?", "what is this ?", f"a {VIDEO} film", f"this {IMAGE} ."]
    images = [[picture("red"), picture("blue", (28, 56))], [], [], [picture("green")]]
    # Wider than it is long: after other films transformers counts the positions of text otherwise than vLLM.
    videos = [[], [], [[picture(color, (56, 28)) for color in ("black", "red", "blue", "black")]], []]
    with rollout(model=actor, pretrain=path, engine_kv_cache_bytes=2**26, **limits) as (made, actor, _):
        for parameter in actor.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        made.update_engine_weights(actor)
        reference = trained_copy(made, actor, tiny_vision.model())
        completions = made.gather_and_generate(GREEDY, all_prompts=texts, all_images=images, all_videos=videos)
        for text, prompt_images, prompt_videos, completion in zip(texts, images, videos, completions, strict=True):
            wanted = tiny_vision.greedy(reference, text, prompt_images, prompt_videos, GREEDY["max_tokens"])
            assert completion.output_token_ids == wanted
        with pytest.raises(EngineError, match="could not generate"):
            made.gather_and_generate(GREEDY, all_prompts=texts[3:], all_images=[[images[3][0], picture("red")]])
        (again,) = made.gather_and_generate(GREEDY, all_prompts=texts[3:], all_images=images[3:])
        assert again.output_token_ids == completions[3].output_token_ids


@pytest.mark.usefixtures("room")
def test_an_adapter_whose_patch_target_is_missing_is_not_built(monkeypatch):
    from vllm.distributed import parallel_state

    monkeypatch.delattr(parallel_state, "_group_name_counter")
    with pytest.raises(EngineError, match=r"parallel_state\._group_name_counter does not exist"), rollout():
        pass


def test_everything_that_the_adapter_uses_of_vllm_is_checked():
    script = Path(__file__).with_name("patch_cases.py")
    child = subprocess.run([sys.executable, script, "vllm"], capture_output=True, text=True, timeout=900)
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["unnoticed"] == []
    assert report["targets"] > 30


# Over ranks


@pytest.mark.parametrize("size", [1, 2])
def test_after_a_stream_failed_on_one_rank_the_next_sync_succeeds(two, size):
    before = set(os.listdir("/dev/shm"))
    errors = two.run(
        fail_on_one_rank, engine_type="vllm", strategy="fsdp", failing=0, engine_tp_size=size, deadline=300.0
    )
    assert errors == [["OSError"], []]
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "cpushm" in name]


@pytest.mark.usefixtures("room")
def test_vllm_opens_models_of_save_model(tmp_path):
    with get_fake_strategy(bf16=False) as saving:
        path = str(saving.save_model(saving.prepare(llama(7)), None, tmp_path / "out"))
    with rollout(pretrain=path) as (made, actor, _):
        made.setup_inference_engine({"pretrain": path, "bf16": False, "engine_kv_cache_bytes": 2**24}, "vllm")
        compare(made, type(actor).from_pretrained(path, dtype=torch.float32), PROMPTS)
