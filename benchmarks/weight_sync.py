"""What the way into an engine costs: a weight sync, beside one call a tensor and a plain copy; and generating through the
strategy, beside the engine's own.

``python benchmarks/weight_sync.py ENGINE MODEL [--strategy NAME] [--rounds N]``, under torchrun for several ranks, each with
an engine of its own. MODEL is a Hugging Face directory; its weights are sent in bf16. What is compared takes turns, so that
what else the machine does meets it alike; the ratios are of medians.
"""

import argparse
import mmap
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from transformers import AutoModelForCausalLM

from lightrft.strategy import Prompt, RolloutEngine, Sampling, StrategyBase, get_strategy

PROMPTS, TOKENS = 64, 128


def main() -> None:
    args = arguments()
    settings = {"strategy": args.strategy, "zero_stage": 3, "bf16": True, "engine_type": args.engine}
    with get_strategy(settings) as strategy:
        actor = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        optimizer = strategy.create_optimizer(actor, lr=1e-5)
        actor, _, _ = strategy.prepare((actor, optimizer, None))
        engine = strategy.setup_inference_engine({"pretrain": args.model, "bf16": True}, args.engine, actor=actor)
        assert engine is not None
        weights = weights_of(strategy, actor)
        syncs = measured(ways(strategy, engine, actor, weights), args.rounds)
        calls = measured(generations(strategy, engine, actor.config.vocab_size), args.rounds)
        if strategy.is_rank_0():
            report(args, syncs, weights)
            through, own = calls.values()
            print(
                f"  {PROMPTS} prompts, {TOKENS} tokens each: through the strategy {through / own:.3f} x the engine's own"
            )


def generations(strategy: StrategyBase, engine: RolloutEngine, vocabulary: int) -> dict[str, Callable[[], object]]:
    """The same completions, asked of the strategy and of the engine."""
    drawn = torch.randint(10, vocabulary, (PROMPTS, 16), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = Sampling(temperature=0.0, max_tokens=TOKENS, min_tokens=TOKENS)
    prompts = [Prompt(token_ids=tuple(it)) for it in drawn]
    return {
        "through the strategy": lambda: strategy.gather_and_generate(sampling, drawn, sleep_engine=False),
        "the engine's own": lambda: engine.generate(prompts, sampling),
    }


def ways(
    strategy: StrategyBase, engine: RolloutEngine, actor: torch.nn.Module, weights: list[tuple[str, torch.Tensor]]
) -> dict[str, Callable[[], object]]:
    """Ways of the weights."""
    return {
        "plain copy": lambda: [new_like(tensor).copy_(tensor) for _, tensor in weights],
        "copy into used memory": lambda: [tensor.clone() for _, tensor in weights],
        "into the engine": lambda: engine.update_weights([*in_buckets(weights, strategy.config.weight_sync_bucket_bytes)]),
        "out of the strategy": lambda: strategy.update_engine_weights(actor),
        "one tensor a call": lambda: engine.update_weights([weight] for weight in weights),
    }  # fmt: skip


def new_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory that the system has just given, as it has to for a copy that was not there before."""
    if tensor.is_cuda:
        return torch.empty_like(tensor)
    return torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=tensor.dtype).view(tensor.shape)


def weights_of(strategy: StrategyBase, actor: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All weights, each in memory of its own."""
    return [(name, tensor.clone()) for bucket in strategy.full_parameters(actor) for name, tensor in bucket]


def in_buckets(weights: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterable[list[tuple[str, torch.Tensor]]]:
    """``weights``, packed up to ``limit`` bytes."""
    bucket: list[tuple[str, torch.Tensor]] = []
    for name, tensor in weights:
        if bucket and sum(it.nbytes for _, it in bucket) + tensor.nbytes > limit:
            yield bucket
            bucket = []
        bucket.append((name, tensor))
    yield bucket


def measured(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            begun = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def report(args: argparse.Namespace, seconds: dict[str, float], weights: list[tuple[str, torch.Tensor]]) -> None:
    size = sum(tensor.nbytes for _, tensor in weights)
    print(
        f"{args.strategy} to {args.engine}: {len(weights)} weights, {size / 1e6:.0f} MB, medians of {args.rounds} rounds"
    )
    for name, time_ in seconds.items():
        print(f"  {name:22} {time_:7.3f} s  {time_ / seconds['plain copy']:6.2f} x a plain copy")
    print(
        f"  one tensor a call takes {seconds['one tensor a call'] / seconds['into the engine']:.1f} x as long as buckets"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("model")
    parser.add_argument("--strategy", default="fake", help="fake, fsdp or deepspeed, which is ZeRO-3")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
