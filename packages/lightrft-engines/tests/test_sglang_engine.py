"""SGLang itself, with a small model: what it generates, what a sync does to it, and what is left when something dies."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("sglang", reason="needs the engine sglang")

import engine_cases
import tiny_vision
from engine_cases import (
    GREEDY,
    PROMPTS,
    adds_no_special_tokens,
    compare,
    descendants,
    ends_at_the_tokenizers_eos,
    experts,
    interrupted,
    llama,
    many_cycles_leave_nothing_behind,
    prompts_draw_independently,
    resident,
    sequences_end_with_the_context,
    settings_agree_with_a_plain_loop,
    smollm2,
    smollm2_path,
    threads_take_turns,
    train,
    trained_copy,
    uniform_model,
    with_tokenizer_that_adds,
)
from tiny_vision import IMAGE, VIDEO, picture
from transformers import AutoTokenizer

from lightrft.config import EngineError, StaleWeightsError
from lightrft.engines.sglang import engine as engine_module
from lightrft.strategy import EngineStatus

__all__ = ["smollm2_path"]  # a fixture
BEFORE, QUIT_BEFORE = dict(os.environ), signal.getsignal(signal.SIGQUIT)
LONG = {"temperature": 0.0, "max_tokens": 120}
rollout = partial(engine_cases.rollout, "sglang")
CHECKED = {"weight_sync_verify": "checksum", "weight_sync_bucket_bytes": 4096, "enable_engine_sleep": True}


@pytest.fixture(scope="module")
def running():
    """A strategy, a model in training, and SGLang with its weights."""
    with rollout(**CHECKED) as running:
        yield running


@pytest.fixture
def made(running):
    return running[0]


def tokens_of(completions):
    return [completion.output_token_ids for completion in completions]


def server_of(made):
    return made.inference_engine._server


def process(made, name):
    """SGLang starts the process of the model first, then that which makes text of tokens."""
    (task,) = [path for path in Path(f"/proc/{server_of(made)._pid}/task").iterdir() if (path / "children").read_text()]
    scheduler, detokenizer = map(int, (task / "children").read_text().split())
    return {"scheduler": scheduler, "detokenizer": detokenizer, "server": server_of(made)._pid}[name]


def runs(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def generate_without_end(made):
    while True:
        made.gather_and_generate({**LONG, "n": 32}, PROMPTS, sleep_engine=False)


# Generation


def test_the_state_of_the_training_process_does_not_change(running):
    changed = {name for name in {*BEFORE, *os.environ} if BEFORE.get(name) != os.environ.get(name)}
    assert not [name for name in changed if name.startswith(("SGLANG_", "SGL_", "NCCL_", "CUDA_DEVICE_MAX"))]
    assert threading.main_thread() is threading.current_thread()
    assert signal.getsignal(signal.SIGQUIT) == QUIT_BEFORE


def test_draws_with_a_seed_do_not_depend_on_the_batch(made):
    sampling = {"temperature": 1.0, "max_tokens": 6, "n": 3, "seed": 11, "top_p": 0.9}
    batch = tokens_of(made.gather_and_generate(sampling, PROMPTS))
    assert len(set(batch)) > 6
    assert tokens_of(made.gather_and_generate(sampling, PROMPTS[2:])) == batch[6:]
    assert tokens_of(made.gather_and_generate({**sampling, "seed": 12}, PROMPTS)) != batch


def test_prompts_with_the_same_seed_get_different_draws():
    with rollout(model=uniform_model()) as (made, *_):
        prompts_draw_independently(made)


def test_a_completion_ends_with_the_token_that_stopped_it(made):
    (plain,) = made.gather_and_generate(LONG, [[5, 6]])
    assert plain.finish_reason == "length"
    assert len(plain.output_token_ids) == 120
    end = plain.output_token_ids[2]
    (stopped,) = made.gather_and_generate({**LONG, "stop_token_ids": [end]}, [[5, 6]])
    assert stopped.finish_reason == "stop"
    first = plain.output_token_ids.index(end)
    assert stopped.output_token_ids == plain.output_token_ids[: first + 1]


def test_log_probabilities_are_the_models_own_under_temperature_and_penalties(running):
    made, actor, _ = running
    reference = trained_copy(made, actor, llama())
    sampling = {"temperature": 1.7, "max_tokens": 5, "seed": 3, "repetition_penalty": 1.5, "presence_penalty": 0.5}
    for given in (sampling, {"temperature": 1.7, "max_tokens": 5, "seed": 3, "top_k": 5}):
        (completion,) = made.gather_and_generate(given, [[3, 4, 5]])
        tokens = [3, 4, 5, *completion.output_token_ids]
        with torch.no_grad():
            rows = reference(torch.tensor([tokens])).logits[0, 2:-1].log_softmax(-1)
        wanted = rows[range(5), list(completion.output_token_ids)]
        assert torch.allclose(torch.tensor(completion.logprobs), wanted, atol=1e-4)


def test_sequences_end_with_the_context(made):
    sequences_end_with_the_context(made)


def test_settings_agree_with_a_plain_loop(running):
    settings_agree_with_a_plain_loop(*running[:2])


def test_threads_take_turns(made):
    threads_take_turns(made)


def test_text_without_a_tokenizer_is_refused(made):
    with pytest.raises(EngineError, match="no tokenizer"):
        made.gather_and_generate(GREEDY, all_prompts=["hello"])


def test_an_empty_prompt_is_an_error_and_the_engine_stays_usable(smollm2_path):
    with rollout(model=smollm2(smollm2_path), pretrain=smollm2_path) as (made, *_):
        pid = server_of(made)._pid
        with pytest.raises(EngineError, match=r"empty prompt|none in prompt"):
            made.gather_and_generate(GREEDY, all_prompts=[""])
        assert len(made.gather_and_generate(GREEDY, PROMPTS)) == 3
        assert server_of(made)._pid == pid


def test_a_tokenizer_adds_nothing_to_text_and_ends_completions(tmp_path):
    with rollout(pretrain=with_tokenizer_that_adds(tmp_path)) as (made, *_):
        adds_no_special_tokens(made)
        ends_at_the_tokenizers_eos(made)


def test_the_last_id_of_the_vocabulary_has_a_log_probability_under_penalties():
    with rollout() as (made, *_):
        sampling = {"temperature": 0.0, "max_tokens": 6, "repetition_penalty": 1.9}
        (completion,) = made.gather_and_generate(sampling, [[5, 6, 7]])
        assert 47 in completion.output_token_ids
        assert len(completion.logprobs) == 6


# Weights


def test_each_sync_brings_the_weights_in_training(running):
    made, actor, optimizer = running
    before = tokens_of(made.gather_and_generate(GREEDY, PROMPTS))
    for _ in range(2):
        train(made, actor, optimizer)
        made.update_engine_weights(actor)
        compare(made, trained_copy(made, actor, llama()), PROMPTS)
    assert tokens_of(made.gather_and_generate(GREEDY, PROMPTS)) != before


def test_a_failed_stream_makes_it_stale_until_the_next_sync_with_the_same_server(running):
    made, actor, _ = running
    pid, version = server_of(made)._pid, made.inference_engine.weight_version

    def dying():
        yield from itertools.islice(made.full_parameters(actor), 3)
        raise RuntimeError("the stream died")

    made.wakeup_inference_engine()
    with pytest.raises(RuntimeError, match="the stream died"):
        made.inference_engine.update_weights(dying())
    with pytest.raises(StaleWeightsError):
        made.gather_and_generate(GREEDY, PROMPTS)
    made.update_engine_weights(actor)
    assert (server_of(made)._pid, made.inference_engine.weight_version) == (pid, version + 1)
    compare(made, trained_copy(made, actor, llama()), PROMPTS)


def test_a_corrupted_bucket_is_an_error(running, monkeypatch):
    made, actor, _ = running
    right = engine_module.checksum
    monkeypatch.setattr(engine_module, "checksum", lambda block: right(block) + 1)
    with pytest.raises(EngineError, match=r"update_weights_from_tensor failed.*expected a bucket with checksum"):
        made.update_engine_weights(actor)
    monkeypatch.undo()
    with pytest.raises(StaleWeightsError):
        made.gather_and_generate(GREEDY, PROMPTS)
    made.update_engine_weights(actor)
    compare(made, trained_copy(made, actor, llama()), PROMPTS)


def test_a_weight_that_sglang_cannot_take_is_an_error(running):
    made, actor, _ = running
    made.wakeup_inference_engine()
    server = server_of(made)
    server.call("begin")
    entry = {"name": "model.norm.weight", "dtype": "float32", "shape": [3], "start": 0}
    block = engine_module.SharedBlock(64)
    server.call("lend", 64, descriptor=block.descriptor)
    with pytest.raises(EngineError, match="update_weights_from_tensor failed"):
        server.call("load", [entry], 64, None, None, 1)
    block.close()
    server.call("end")
    made.update_engine_weights(actor)


def test_loading_outside_a_session_is_an_error(made):
    made.wakeup_inference_engine()
    block = engine_module.SharedBlock(64)
    server_of(made).call("lend", 64, descriptor=block.descriptor)
    with pytest.raises(EngineError, match=r"between\s+begin_weight_update"):
        server_of(made).call("load", [], 64, None, None, 1)
    block.close()


def test_everything_that_the_adapter_uses_of_sglang_is_checked():
    script = Path(__file__).with_name("patch_cases.py")
    child = subprocess.run([sys.executable, script, "sglang"], capture_output=True, text=True, timeout=900)
    assert child.returncode == 0, child.stderr[-2000:]
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["unnoticed"] == []
    assert report["targets"] > 40


# Memory


def test_sleep_and_wake_change_no_token(running):
    made, actor, _ = running
    engine = made.inference_engine
    made.update_engine_weights(actor)
    wanted = tokens_of(made.gather_and_generate(GREEDY, PROMPTS, sleep_engine=False))
    engine.sleep(level=1)
    assert tokens_of(made.gather_and_generate(GREEDY, PROMPTS)) == wanted
    engine.sleep(level=2)
    with pytest.raises(StaleWeightsError, match="dropped the weights"):
        made.gather_and_generate(GREEDY, PROMPTS)
    made.update_engine_weights(actor)
    assert tokens_of(made.gather_and_generate(GREEDY, PROMPTS)) == wanted


def test_many_cycles_leak_nothing(running):
    many_cycles_leave_nothing_behind(*running[:2])


# Death


@pytest.mark.parametrize("victim", ["scheduler", "detokenizer", "server"])
def test_a_killed_process_is_an_error_and_the_next_sync_starts_a_new_server(running, victim):
    made, actor, _ = running
    made.update_engine_weights(actor)
    old = server_of(made)
    pid = process(made, victim)
    group = [old._pid, *descendants(old._pid)]
    killer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    killer.start()
    begun = time.monotonic()
    with pytest.raises(EngineError, match="during 'generate'") as caught:
        generate_without_end(made)
    killer.join()
    assert "died" in str(caught.value)
    assert time.monotonic() - begun < 60
    assert not [pid for pid in group if runs(pid)]
    assert made.inference_engine_status is EngineStatus.ASLEEP
    with pytest.raises(StaleWeightsError, match="its server process died"):
        made.gather_and_generate(GREEDY, PROMPTS)
    assert made.inference_engine_status is EngineStatus.ASLEEP
    made.update_engine_weights(actor)
    assert server_of(made)._pid != old._pid
    compare(made, trained_copy(made, actor, llama()), PROMPTS)


def test_an_interrupted_call_ends_the_server(running):
    made, actor, _ = running
    made.update_engine_weights(actor)
    with interrupted(1.0):
        generate_without_end(made)
    with pytest.raises((StaleWeightsError, EngineError)):
        made.gather_and_generate({**GREEDY, "max_tokens": 200}, PROMPTS)
    made.update_engine_weights(actor)
    compare(made, trained_copy(made, actor, llama()), PROMPTS)


def test_a_server_that_does_not_answer_in_time_is_ended(running):
    made, actor, _ = running
    made.update_engine_weights(actor)
    server = server_of(made)
    assert server._timeout < made.config.timeout  # or ranks that wait would give up at the same time
    os.kill(process(made, "scheduler"), signal.SIGSTOP)
    server._timeout = 2.0
    with pytest.raises(EngineError, match=r"within 2 s \(timeout\)"):
        made.gather_and_generate(GREEDY, PROMPTS, sleep_engine=False)
    made.update_engine_weights(actor)
    assert len(made.gather_and_generate(GREEDY, PROMPTS)) == 3


def test_killed_training_leaves_no_server_and_no_file():
    before = set(os.listdir("/dev/shm"))
    script = textwrap.dedent("""
        import os, signal
        from engine_cases import rollout
        with rollout("sglang") as (made, _, _):
            server = made.inference_engine._server
            print("server", server._pid, server._directory.path, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    match = re.search(r"server (\d+) (.+)", child.stdout)
    assert match, child.stderr[-2000:]
    assert child.returncode == -signal.SIGKILL
    group, deadline = int(match[1]), time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"processes of the group {group} are still there")
    assert not Path(match[2]).exists()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("sgl")]


def test_a_fork_that_ends_leaves_the_engine_alone():
    script = textwrap.dedent("""
        import os, sys
        from engine_cases import GREEDY, PROMPTS, rollout
        with rollout("sglang") as (made, actor, _):
            if os.fork() == 0:
                sys.exit(0)
            os.wait()
            made.gather_and_generate(GREEDY, PROMPTS)
            made.inference_engine._server.end()
            made.update_engine_weights(actor)
            print("answered", len(made.gather_and_generate(GREEDY, PROMPTS)))
    """)
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert "answered 3" in child.stdout, child.stderr[-2000:]


def test_a_model_that_sglang_cannot_run_is_an_error_with_its_message(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchForCausalLM"]}')
    with (
        pytest.raises(EngineError, match=r"NoSuchForCausalLM|SGLang"),
        rollout(model=llama(), pretrain=str(tmp_path)),
    ):
        pass


# Models


def test_smollm2_generates_as_transformers_does_and_frees_its_memory(smollm2_path):
    model = smollm2(smollm2_path)
    with rollout(model=model, pretrain=smollm2_path, enable_engine_sleep=True) as (made, actor, optimizer):
        train(made, actor, optimizer)
        made.update_engine_weights(actor)
        compare(made, trained_copy(made, actor, smollm2(smollm2_path)), PROMPTS)
        (text,) = made.gather_and_generate({"temperature": 0, "max_tokens": 3}, all_prompts=["3 + 4 ="])
        assert text.text == AutoTokenizer.from_pretrained(smollm2_path).decode(text.output_token_ids)
        made.wakeup_inference_engine()
        model_process = process(made, "scheduler")
        awake, weights = resident(model_process), sum(parameter.nbytes for parameter in actor.parameters())
        made.inference_engine.sleep(level=2)
        assert resident(model_process) < awake - 0.95 * weights


def test_images_and_videos_reach_the_model_after_a_sync(tmp_path):
    actor, path = tiny_vision.model().train(), tiny_vision.save(tmp_path)
    texts = [f"what is {IMAGE} and {IMAGE} ?", "what is this ?", f"a {VIDEO} film", f"this {IMAGE} ."]
    # Of sizes that need no change: SGLang has limits of its own for what is smaller or larger.
    images = [[picture("red", (84, 56)), picture("blue", (56, 84))], [], [], [picture("green", (112, 56))]]
    videos = [[], [], [[picture(color, (56, 56)) for color in ("black", "red", "blue", "black")]], []]
    with rollout(model=actor, pretrain=path) as (made, actor, _):
        for _ in range(2):  # the second time the pictures are known, and what the old weights made of them is not used
            for parameter in actor.parameters():
                parameter.data.add_(0.05 * torch.randn_like(parameter))
            made.update_engine_weights(actor)
            reference = trained_copy(made, actor, tiny_vision.model())
            completions = made.gather_and_generate(GREEDY, all_prompts=texts, all_images=images, all_videos=videos)
            for text, prompt_images, prompt_videos, completion in zip(texts, images, videos, completions, strict=True):
                wanted = tiny_vision.greedy(reference, text, prompt_images, prompt_videos, GREEDY["max_tokens"])
                assert completion.output_token_ids == wanted


def test_media_with_token_ids_need_as_many_placeholders(tmp_path):
    actor, path = tiny_vision.model().train(), tiny_vision.save(tmp_path)
    texts, images = [f"what is {IMAGE} ?", "what is this ?"], [[picture("red", (84, 56))], []]
    known = tiny_vision.ids()
    ids = [[known[word] for word in text.replace("><", "> <").split()] for text in texts]
    with rollout(model=actor, pretrain=path) as (made, *_):
        wanted = tokens_of(made.gather_and_generate(GREEDY, all_prompts=texts, all_images=images))
        assert tokens_of(made.gather_and_generate(GREEDY, ids, texts, images)) == wanted
        for text, given, count in ((texts[0], 2, 1), (texts[1], 1, 0)):
            with pytest.raises(
                EngineError, match=f"expected {given} placeholders for {given} images in a prompt, got {count}"
            ):
                made.gather_and_generate(GREEDY, all_prompts=[text], all_images=[images[0] * given])
        assert tokens_of(made.gather_and_generate(GREEDY, ids, texts, images)) == wanted


def test_a_weight_that_sglang_does_not_use_is_an_error():
    words = r"LlamaForCausalLM does not use 6 of the weights, the first is model\.layers\.0\.mlp\.gate_proj\.bias"
    with pytest.raises(EngineError, match=words), rollout(model=llama(mlp_bias=True), weight_sync_bucket_bytes=2**20):
        pass


def test_experts_are_streamed_under_their_names_on_disk():
    with rollout(model=experts(), weight_sync_verify="checksum") as (made, actor, optimizer):
        train(made, actor, optimizer)
        made.update_engine_weights(actor)
        compare(made, trained_copy(made, actor, experts()), PROMPTS)
