"""The time of a weight sync, compared with one call per tensor and a plain copy; and of generation through a strategy,
compared with the engine alone.

``python benchmarks/weight_sync.py ENGINE [--strategy NAME] [--rounds N]``; under torchrun for several ranks, with one engine
per rank. The weights have SmolLM2-135M's shapes, in bf16. The rounds alternate, so that other load on the machine affects all
measurements alike. Reports ratios of medians. Exit status 1 if a target is missed.
"""

import argparse
import mmap
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import save_smollm2, seconds_of, smollm2

from lightrft.engines.sglang.shared_memory import pieces
from lightrft.strategy import RolloutEngine, Sampling, StrategyBase, get_strategy

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 128, 32


@dataclass(frozen=True)
class Ratio:
    """A measured ratio and its target."""

    name: str
    value: float
    bound: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.bound is None or (self.value >= self.bound if self.at_least else self.value <= self.bound)

    def __str__(self) -> str:
        target = "" if self.bound is None else f"   target: {'>=' if self.at_least else '<='} {self.bound:g}"
        return f"{self.name:44} {self.value:8.3f}{target}"


def main() -> int:
    """Measure and print; returns the exit status."""
    args = arguments()
    settings = {
        "strategy": args.strategy,
        "zero_stage": 3,
        "bf16": True,
        "engine_type": args.engine,
        "device": args.device,
    }
    with tempfile.TemporaryDirectory() as folder, get_strategy(settings) as strategy:
        actor: Any = smollm2(torch.bfloat16)
        optimizer = strategy.create_optimizer(actor, lr=1e-5)
        actor, _, _ = strategy.prepare((actor, optimizer, None))
        source = {"pretrain": str(save_smollm2(Path(folder))), "bf16": True}  # each rank has its own folder
        engine = strategy.setup_inference_engine(source, args.engine, actor=actor)
        assert engine is not None
        weights = weights_of(strategy, actor)
        syncs = median_seconds(sync_variants(strategy, engine, actor, weights), args.rounds, strategy.device)
        calls = {}
        if strategy.world_size == 1:  # several ranks would compete for the CPUs
            calls = generation(strategy, engine, actor.config.vocab_size, args.generations)
        if not strategy.is_rank_0():
            return 0
        size = sum(tensor.nbytes for _, tensor in weights)
        print(
            f"{args.strategy}, {strategy.world_size} rank(s), {args.engine}: {len(weights)} weights, {size / 1e6:.0f} MB"
        )
        seconds = syncs | calls
        for name, median in seconds.items():
            print(f"{name:44} {median:8.3f} s")
        results = ratios(args.engine, strategy.world_size, seconds)
        print(*results, sep="\n")
        return int(not all(ratio.met for ratio in results))


def ratios(engine: str, ranks: int, seconds: dict[str, float]) -> list[Ratio]:
    """The ratios, with targets for ``engine`` on ``ranks``."""
    copy, calls = seconds["plain copy"], seconds["one tensor per call"]
    results = [
        Ratio("engine update / plain copy", seconds["engine update"] / copy, 2.5 if ranks == 1 else None),
        Ratio("strategy sync / plain copy", seconds["strategy sync"] / copy, 4 if ranks > 1 else None),
        Ratio("one tensor per call / engine update", calls / seconds["engine update"], 8 if engine == "sglang" else None, True),
    ]  # fmt: skip
    if ranks == 1:
        overhead = seconds["strategy generation"] / seconds["engine generation"]
        results.append(Ratio("strategy generation / engine generation", overhead, 1.03))
    return results


def generation(strategy: StrategyBase, engine: RolloutEngine, vocabulary: int, rounds: int) -> dict[str, float]:
    """Median seconds of `gather_and_generate` for `PROMPTS` prompts, and of its engine's `generate`.

    The same calls measure both: the difference is smaller than the variation between calls.
    """
    prompts = torch.randint(
        10, vocabulary, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)
    ).tolist()
    sampling = Sampling(temperature=0.0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    inner: list[float] = []
    generate: Any = engine.generate

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return generate(*arguments)
        finally:
            inner.append(time.perf_counter() - start)

    engine.generate = timed  # type: ignore[method-assign]
    outer = {"strategy generation": lambda: strategy.gather_and_generate(sampling, prompts, sleep_engine=False)}
    return {**median_seconds(outer, rounds, strategy.device), "engine generation": statistics.median(inner[1:])}


def sync_variants(
    strategy: StrategyBase, engine: RolloutEngine, actor: torch.nn.Module, weights: list[tuple[str, torch.Tensor]]
) -> dict[str, Callable[[], object]]:
    """Ways to move the weights."""
    return {
        "plain copy": lambda: [new_like(tensor).copy_(tensor) for _, tensor in weights],
        "copy into reused memory": lambda: [tensor.clone() for _, tensor in weights],
        "engine update": lambda: engine.update_weights([*pieces(weights, strategy.config.weight_sync_bucket_bytes)]),
        "strategy sync": lambda: strategy.update_engine_weights(actor),
        "one tensor per call": lambda: engine.update_weights([weight] for weight in weights),
    }  # fmt: skip


def new_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in memory that the system has just mapped, as for a new copy."""
    if tensor.is_cuda:
        return torch.empty_like(tensor)
    return torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=tensor.dtype).view(tensor.shape)


def weights_of(strategy: StrategyBase, actor: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Copies of all weights."""
    return [(name, tensor.clone()) for bucket in strategy.full_parameters(actor) for name, tensor in bucket]


def median_seconds(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each variant after a warm-up round; every other round runs in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in list(variants.items())[:: -1 if number % 2 else 1]:
            seconds[name].append(seconds_of(run, device))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("--strategy", default="fake", help="fake, fsdp or deepspeed (ZeRO-3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of syncs")
    parser.add_argument("--generations", type=int, default=3, help="rounds of generation")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
