"""What a weight sync costs: all weights of a model in bf16, in buckets, one tensor a call, and plainly copied.

``python benchmarks/weight_sync.py ENGINE MODEL [--rounds N]``, where MODEL is a Hugging Face directory. The three take
turns, so that what else the machine does meets them alike; the ratios are of medians.
"""

import argparse
import mmap
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from transformers import AutoModelForCausalLM

from lightrft.strategy import RolloutEngine, StrategyBase, get_strategy


def main() -> None:
    args = arguments()
    with get_strategy({"strategy": "fake", "bf16": True, "engine_type": args.engine}) as strategy:
        actor = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        optimizer = strategy.create_optimizer(actor, lr=1e-5)
        actor, _, _ = strategy.prepare((actor, optimizer, None))
        engine = strategy.setup_inference_engine({"pretrain": args.model, "bf16": True}, args.engine, actor=actor)
        assert engine is not None
        report(args, measured(ways(strategy, engine, actor), args.rounds), weights_of(strategy, actor))


def ways(strategy: StrategyBase, engine: RolloutEngine, actor: torch.nn.Module) -> dict[str, Callable[[], object]]:
    """What is measured."""
    weights = weights_of(strategy, actor)
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
    print(f"{args.engine}: {len(weights)} weights, {size / 1e6:.0f} MB, medians of {args.rounds} rounds")
    for name, time_ in seconds.items():
        print(f"  {name:22} {time_:7.3f} s  {time_ / seconds['plain copy']:6.2f} x a plain copy")
    print(
        f"  one tensor a call takes {seconds['one tensor a call'] / seconds['into the engine']:.1f} x as long as buckets"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
