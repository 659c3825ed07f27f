"""What goes to SGLang and what comes back, and what the patches do; without SGLang."""

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightrft.config import ConfigError, EngineError, StrategyConfig
from lightrft.engines.model_source import ModelSource
from lightrft.engines.sglang import (
    arguments,
    host_memory,
    patches,
    requests,
    seeded_sampling,
    server_process,
    shared_memory,
)
from lightrft.engines.sglang.server import Server
from lightrft.engines.sglang.unused_weights import unused_weights, watched
from lightrft.strategy.engine import Prompt, Sampling

SOURCE = ModelSource(
    path="/nowhere",
    loads_weights=True,
    stores_weights=True,
    has_tokenizer=True,
    expected=None,
    vocab_size=48,
    max_model_len=512,
    eos_token_ids=frozenset({2}),
)


def server_arguments(device="cpu", **settings):
    config = StrategyConfig.from_args(settings)
    return arguments.server_arguments(config, SOURCE, device=device, index=3, seed=5)


# Arguments


def test_settings_become_arguments():
    made = server_arguments("cuda", bf16=False, engine_tp_size=2, engine_mem_util=0.3, enable_engine_sleep=True)
    assert made["dtype"] == "float32"
    assert (made["tp_size"], made["base_gpu_id"], made["random_seed"]) == (2, 3, 5)
    assert made["mem_fraction_static"] == 0.3
    assert made["enable_memory_saver"] is True
    assert "device" not in made


def test_remote_code_is_trusted_only_if_asked_for():
    assert server_arguments()["trust_remote_code"] is False
    assert server_arguments(trust_remote_code=True)["trust_remote_code"] is True


def test_sglangs_own_arguments_win():
    assert server_arguments(engine_arguments={"dtype": "float16", "page_size": 16})["dtype"] == "float16"
    with pytest.raises(ConfigError, match=r"engine_arguments: expected a mapping.*, got 3"):
        server_arguments(engine_arguments=3)


def test_a_cache_holds_what_its_bytes_hold_and_no_more_than_its_sequences_need():
    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_hidden_layers": 3}
    assert arguments.token_bytes(small, 2) == 2 * 2 * 8 * 2 * 3
    assert arguments.cache_tokens(small, 192_000, 2, sequences=5) == 1000
    assert arguments.cache_tokens({**small, "max_position_embeddings": 100}, 192_000, 2, sequences=5) == 500


def test_the_servers_environment_has_no_variables_of_a_rank():
    variables = arguments.server_variables(
        {"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "SGLANG_USE_CPU_ENGINE": "1", "PATH": "p"}, "/folder", on_cpu=True
    )
    assert variables["PATH"] == "p"
    assert variables["TMPDIR"] == "/folder"
    assert not {"RANK", "TORCHELASTIC_RUN_ID", "SGLANG_USE_CPU_ENGINE"} & set(variables)


@pytest.mark.parametrize(("cores", "wanted"), [((0, 1, 2, 3, 4), "0,1|2,3"), ((7,), "7|7")])
def test_ranks_on_a_cpu_share_its_cores(cores, wanted):
    variables = arguments.server_variables({}, "/folder", on_cpu=True, ranks=2, cores=cores)
    assert variables["SGLANG_CPU_OMP_THREADS_BIND"] == wanted


# Requests


def test_sampling_in_sglangs_names():
    sampling = Sampling(temperature=0.5, top_k=0, max_tokens=7, stop_token_ids=(9,), include_stop_str_in_output=True)
    parameters = requests.sampling_arguments(sampling, {2}, tokenizer=True)
    assert parameters["max_new_tokens"] == 7
    assert parameters["top_k"] == -1
    assert parameters["stop_token_ids"] == [2, 9]
    assert parameters["no_stop_trim"] is True
    ignoring = requests.sampling_arguments(Sampling(ignore_eos=True), {2}, tokenizer=True)
    assert ignoring["stop_token_ids"] == []


def test_min_tokens_without_a_tokenizer_are_refused_where_anything_ends_a_sequence():
    assert requests.sampling_arguments(Sampling(min_tokens=3), set(), tokenizer=False)["min_new_tokens"] == 0
    with pytest.raises(EngineError, match="min_tokens"):
        requests.sampling_arguments(Sampling(min_tokens=3), {2}, tokenizer=False)


def test_a_seed_depends_on_prompt_and_sample_only():
    one, two = Prompt(token_ids=(1, 2)), Prompt(token_ids=(3,))
    together = requests.seeds([one, two], Sampling(n=2, seed=4))
    assert len(set(together)) == 4
    assert requests.seeds([two], Sampling(n=2, seed=4)) == together[2:]
    assert requests.seeds([one], Sampling(seed=5)) != together[:1]
    assert requests.seeds([one], Sampling(n=2)) == [None, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finish_reason": "abort", "message": "too long"}, "'abort' from SGLang: too long"),
        ({"weight_version": "2"}, "weight version 3, got '2'"),
        ({"logprobs": [(-0.5, 8)]}, "other tokens"),
    ],
)
def test_an_incomplete_answer_is_an_error(change, words):
    answer = {
        "prompt_tokens": [1], "tokens": [7], "logprobs": [(-0.5, 7)], "finish_reason": "length", "message": "",
        "weight_version": "3", "text": None,
    }  # fmt: skip
    (good,) = requests.completions([Prompt(token_ids=(1,))], [answer], Sampling(), version=3)
    assert (good.output_token_ids, good.logprobs, good.weight_version) == ((7,), (-0.5,), 3)
    with pytest.raises(EngineError, match=words):
        requests.completions([Prompt(token_ids=(1,))], [{**answer, **change}], Sampling(), version=3)


def test_a_missing_answer_is_an_error():
    with pytest.raises(EngineError, match="2 answers to each of 1 prompts, got 0"):
        requests.completions([Prompt(token_ids=(1,))], [], Sampling(n=2), version=1)


def test_token_ids_replace_text_unless_they_are_empty():
    for prompt, text, tokens in [
        (Prompt(token_ids=(1,), text="a"), None, (1,)),
        (Prompt(token_ids=(), text="a"), "a", None),
        (Prompt(token_ids=()), None, ()),
    ]:
        assert requests.request(prompt) == {"text": text, "tokens": tokens, "images": [], "videos": []}


def test_token_ids_beside_media_must_be_those_of_the_text():
    server, words = Server(None), ["<i>", "what", "is"]

    class Tokenizer:
        def __call__(self, text, **_):
            return {"input_ids": [words.index(word) for word in text.split()]}

        def decode(self, tokens, **_):
            return " ".join(words[token] for token in tokens)

    server._engine = SimpleNamespace(tokenizer_manager=SimpleNamespace(tokenizer=Tokenizer()))
    assert server._text_of([0, 1], None) == "<i> what"
    assert server._text_of([0, 1], " <i>  what") == " <i>  what"
    with pytest.raises(EngineError, match="got other ids for '<i> is'"):
        server._text_of([0, 1], "<i> is")


@pytest.mark.parametrize(("text", "images"), [("<i> ?", 2), ("?", 1), ("<i> <i>", 1)])
def test_the_numbers_of_media_and_placeholders_must_agree(text, images):
    request = {"text": text, "images": [None] * images, "videos": []}
    requests.check_placeholders({**request, "text": "<i>" * images}, re.compile("<i>"), None)
    with pytest.raises(
        EngineError, match=rf"expected {images} placeholders for {images} images in a prompt, got {text.count('<i>')}"
    ):
        requests.check_placeholders(request, re.compile("<i>"), None)


@pytest.mark.parametrize(
    ("config", "windows", "words"),
    [
        ({}, [], None),
        ({"sliding_window": 4}, [], "the last 4"),
        ({"sliding_window": 4}, [-1, 3], None),
        ({"sliding_window": 4, "use_sliding_window": False}, [], None),
        ({"sliding_window": 4, "layer_types": ["full_attention"]}, [], None),
        ({"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}, [-1], "the last 4"),
        ({"sliding_window": 10}, [], None),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, [], "dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, [], None),
    ],
)  # fmt: skip
def test_models_that_sglang_computes_differently_are_recognised(config, windows, words):
    layers = [SimpleNamespace(), *(SimpleNamespace(sliding_window_size=window) for window in windows)]
    mismatch = patches.model_mismatch(config, iter(layers), max_model_len=10)
    assert mismatch is None if words is None else words in mismatch


def test_accumulated_penalties_multiply_first():
    scaling = torch.full((1, 2), 2.0)
    info = SimpleNamespace(acc_scaling_penalties=scaling)
    logits = torch.tensor([[3.0, -3.0]])

    def original(info, given):
        assert info.acc_scaling_penalties is None
        given.add_(torch.tensor([[-1.0, 0.0]]))

    patches.accumulated_repetition_first(original, info, logits)
    assert logits.tolist() == [[0.5, -6.0]]
    assert info.acc_scaling_penalties is scaling


def test_a_weight_whose_metadata_alone_is_read_is_unused():
    names = ["copied", "narrowed", "by its data", "stacked", "in a thread", "metadata read", "not read"]
    weights = dict(watched([(name, torch.ones(2, 2)) for name in names]))
    target = torch.zeros(2, 2)
    target.copy_(weights["copied"])
    weights["narrowed"].narrow(0, 0, 1)
    target.data.copy_(weights["by its data"].data)
    torch.stack([weights["stacked"], target])
    with ThreadPoolExecutor(1) as threads:
        threads.submit(lambda: target.add_(weights["in a thread"])).result()
    seen = weights["metadata read"]
    assert (seen.shape, seen.dtype, seen.size(0), seen.numel(), seen.is_cuda) == ((2, 2), torch.float32, 2, 4, False)
    assert unused_weights(list(weights.items())) == names[-2:]
    assert type(target) is torch.Tensor


def test_only_the_last_id_of_the_vocabulary_is_corrected():
    assert requests.scored_tokens([3, 47, 47], [(-1.0, 3), (-2.0, 0), (-3.0, 47)], 47) == [
        (-1.0, 3), (-2.0, 47), (-3.0, 47)
    ]  # fmt: skip
    assert requests.scored_tokens([3, 46], [(-1.0, 0), (-2.0, 0)], 47) == [(-1.0, 0), (-2.0, 0)]


def test_zombies_do_not_count_as_running():
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        os.kill(child.pid, signal.SIGSTOP)
        assert server_process._runs_in(child.pid, Path(f"/proc/{child.pid}/stat"))
        server_process._killed(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not server_process._killed(child.pid)
    finally:
        child.wait()


# Weights


def test_a_bucket_goes_through_shared_memory_unchanged():
    bucket = [
        ("odd", torch.arange(3, dtype=torch.uint8)),
        ("half", torch.randn(5, 3).bfloat16()),
        ("scalar", torch.tensor(2.5, dtype=torch.float64)),
        ("transposed", torch.randn(4, 2).T),
    ]
    entries, size = shared_memory.layout(bucket)
    block = shared_memory.SharedBlock(size)
    try:
        shared_memory.fill(block.bytes, entries, bucket)
        again = shared_memory.from_json(shared_memory.to_json(entries))
        arrived = dict(shared_memory.views(block.bytes, again))
        assert list(arrived) == [name for name, _ in bucket]
        assert all(torch.equal(arrived[name], tensor) for name, tensor in bucket)
        del arrived
    finally:
        block.close()


def test_a_bucket_is_split_into_pieces_below_the_limit_except_for_a_larger_tensor():
    bucket = [(str(size), torch.zeros(size, dtype=torch.uint8)) for size in (3, 4, 9, 1, 1)]
    names = [[name for name, _ in piece] for piece in shared_memory.pieces(bucket, 7)]
    assert names == [["3", "4"], ["9"], ["1", "1"]]
    assert list(shared_memory.pieces([], 7)) == []


def test_a_checksum_depends_on_every_byte_and_its_position():
    block = torch.randint(256, (4096,), dtype=torch.uint8)
    before = shared_memory.checksum(block)
    assert shared_memory.checksum(block.clone()) == before
    for position in (0, 7, 2048, 4095):
        changed = block.clone()
        changed[position] ^= 1
        assert shared_memory.checksum(changed) != before
    swapped = torch.cat([block[8:16], block[:8], block[16:]])
    assert shared_memory.checksum(swapped) != before


# Drawing


def test_draws_are_uniform_and_differ_by_seed_and_position():
    seeds = torch.randint(-(2**63), 2**63 - 1, (4000,))
    numbers = seeded_sampling.uniform(seeds, torch.arange(4000))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.03
    assert len(numbers.unique()) == 4000
    same_seed = seeded_sampling.uniform(torch.zeros(100, dtype=torch.int64), torch.arange(100))
    assert len(same_seed.unique()) == 100


def test_filters_keep_the_right_tokens():
    probs = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).repeat(4, 1)
    kept = seeded_sampling.filtered(
        probs, torch.tensor([4, 2, 4, 4]), torch.tensor([1.0, 1.0, 0.6, 1.0]), torch.tensor([0.0, 0.0, 0.0, 0.6])
    )
    wanted = [[0.4, 0.1, 0.3, 0.2], [0.4, 0, 0.3, 0], [0.4, 0, 0.3, 0], [0.4, 0, 0.3, 0]]
    assert torch.equal(kept, torch.tensor(wanted))


def test_resumed_memory_has_the_same_size():
    tensor = torch.ones(1000)
    memory = host_memory.HostMemory(lambda: [tensor, tensor[:10]], list)
    memory.pause("weights")
    memory.pause("weights")
    memory.pause("cuda_graph")
    assert tensor.untyped_storage().nbytes() == 0
    memory.resume("weights")
    memory.resume("weights")
    assert tensor.untyped_storage().nbytes() == 4000
