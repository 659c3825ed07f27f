"""What ranks do in the tests of SGLang: a model in training, an engine, and generation held against transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightrft.strategy import StrategyBase, get_strategy

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
EXTRA = ("pretrain", "weight_sync_verify", "engine_kv_cache_bytes")
"""Settings of the engine alone."""
GREEDY = {"temperature": 0.0, "max_tokens": 8}


def tiny(seed: int = 1) -> Any:
    """A small Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def smollm2(path: str) -> Any:
    """SmolLM2 in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@contextmanager
def rollout(
    strategy: str = "fake", engine: str = "sglang", model: Any = None, **settings: Any
) -> Iterator[tuple[StrategyBase, Any, Any]]:
    """A strategy with a model in training and an engine with its weights."""
    config = {"train_batch_size": 2, "micro_train_batch_size": 1, "bf16": False, **settings}
    extra = {name: config.pop(name) for name in list(config) if name in EXTRA}
    with get_strategy({"strategy": strategy, "engine_type": engine, **config}) as made:
        actor = tiny() if model is None else model
        optimizer = made.create_optimizer(actor, lr=1e-3, weight_decay=0.0)
        actor, optimizer, _ = made.prepare((actor, optimizer, None))
        made.setup_inference_engine({**config, **extra}, engine, actor=actor)
        yield made, actor, optimizer


def train(made: StrategyBase, actor: Any, optimizer: Any, updates: int = 2) -> None:
    """A few updates, alike in every strategy."""
    for number in range(updates * made.accumulated_gradient):
        generator = torch.Generator().manual_seed(100 * number + made.get_rank())
        tokens = torch.randint(40, (1, 12), generator=generator)
        loss = actor(tokens, labels=tokens).loss
        made.backward(loss, actor, optimizer)
        made.optimizer_step(optimizer, actor)


def whole(made: StrategyBase, actor: Any, empty: Any) -> Any:
    """The weights in training, in a model of transformers' own."""
    weights = {name: tensor.clone() for bucket in made.full_parameters(actor) for name, tensor in bucket}
    empty.load_state_dict(weights, strict=False)
    empty.tie_weights()
    return empty.eval()


def greedy(model: Any, prompt: list[int], count: int) -> tuple[tuple[int, ...], list[float]]:
    """Tokens and their log-probabilities by a whole forward for each, which no engine has a part in."""
    tokens, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            row = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return tuple(tokens[len(prompt) :]), logprobs


def compare(made: StrategyBase, reference: Any, prompts: list[list[int]], tolerance: float = 1e-3) -> None:
    """Raise unless the engine's greedy tokens are the reference's, and log-probabilities agree."""
    for completion in made.gather_and_generate(GREEDY, all_prompt_token_ids=prompts):
        tokens, logprobs = greedy(reference, list(completion.prompt_token_ids), GREEDY["max_tokens"])
        assert completion.output_token_ids == tokens, (completion.output_token_ids, tokens)
        worst = max(abs(a - b) for a, b in zip(completion.logprobs, logprobs, strict=True))
        assert worst < tolerance, worst


def sync_and_compare(strategy: str, path: str | None = None, **settings: Any) -> int:
    """Train, sync, and hold the engine's tokens against transformers' on the weights in training."""
    model = tiny() if path is None else smollm2(path)
    with rollout(strategy, model=model, pretrain=path, **settings) as (made, actor, optimizer):
        train(made, actor, optimizer)
        made.update_engine_weights(actor)
        reference = whole(made, actor, tiny(9) if path is None else smollm2(path))
        compare(made, reference, PROMPTS[made.get_rank() :])
        return 0 if made.inference_engine is None else made.inference_engine.weight_version
