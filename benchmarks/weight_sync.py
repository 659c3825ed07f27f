"""What the way into an engine costs: a weight sync, beside one call a tensor and a plain copy; and generating through the
strategy, beside the engine's own.

``python benchmarks/weight_sync.py ENGINE [--strategy NAME] [--rounds N]``, under torchrun for several ranks, each with an
engine of its own. The weights are SmolLM2-135M's, in bf16. What is compared takes turns, so that what else the machine does
meets it alike; the ratios are of medians. Ends with 1 where a target is missed.
"""

import argparse
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightrft.engines.sglang.shared import pieces
from lightrft.strategy import RolloutEngine, Sampling, StrategyBase, get_strategy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/rlvr_arithmetic"))
from setup_model import unpack

MODEL = Path("runs/SmolLM2-135M-Instruct")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 128, 32


@dataclass(frozen=True)
class Ratio:
    """What was measured, and its target."""

    name: str
    value: float
    bound: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.bound is None or (self.value >= self.bound if self.at_least else self.value <= self.bound)

    def __str__(self) -> str:
        wanted = "" if self.bound is None else f"   wanted: at {'least' if self.at_least else 'most'} {self.bound:g}"
        return f"{self.name:44} {self.value:8.3f}{wanted}"


def main() -> int:
    """Measure, and print; 1 where a target is missed."""
    args = arguments()
    settings = {"strategy": args.strategy, "zero_stage": 3, "bf16": True, "engine_type": args.engine}
    with get_strategy(settings) as strategy:
        if strategy.is_rank_0():
            unpack(MODEL)
        strategy.sync_and_clear_cache()
        actor = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
        optimizer = strategy.create_optimizer(actor, lr=1e-5)
        actor, _, _ = strategy.prepare((actor, optimizer, None))
        engine = strategy.setup_inference_engine({"pretrain": str(MODEL), "bf16": True}, args.engine, actor=actor)
        assert engine is not None
        weights = weights_of(strategy, actor)
        syncs = measured(ways(strategy, engine, actor, weights), args.rounds)
        calls = {}
        if strategy.world_size == 1:  # several would time each other
            calls = generation(strategy, engine, actor.config.vocab_size, args.generations)
        if not strategy.is_rank_0():
            return 0
        size = sum(tensor.nbytes for _, tensor in weights)
        print(
            f"{args.strategy} on {strategy.world_size} rank(s), {args.engine}: {len(weights)} weights, {size / 1e6:.0f} MB"
        )
        for name, time_ in {**syncs, **calls}.items():
            print(f"{name:44} {time_:8.3f} s")
        found = ratios(args.engine, strategy.world_size, {**syncs, **calls})
        print(*found, sep="\n")
        return int(not all(it.met for it in found))


def ratios(engine: str, ranks: int, seconds: dict[str, float]) -> list[Ratio]:
    """What is asked for."""
    copy, calls = seconds["plain copy"], seconds["one tensor a call"]
    found = [
        Ratio("into the engine / plain copy", seconds["into the engine"] / copy, 2.5 if ranks == 1 else None),
        Ratio("out of the strategy / plain copy", seconds["out of the strategy"] / copy, 4 if ranks > 1 else None),
        Ratio("one tensor a call / into the engine", calls / seconds["into the engine"], 8 if engine == "sglang" else None, True),
    ]  # fmt: skip
    if ranks == 1:
        added = seconds["through the strategy"] / seconds["the engine's own"]
        found.append(Ratio("generating through the strategy / its own", added, 1.03))
    return found


def generation(strategy: StrategyBase, engine: RolloutEngine, vocabulary: int, rounds: int) -> dict[str, float]:
    """Median seconds that `PROMPTS` take the strategy, and of these its engine.

    Both are taken in the same calls, or the machine's moods would be larger than what is looked for.
    """
    drawn = torch.randint(10, vocabulary, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    sampling = Sampling(temperature=0.0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    inner: list[float] = []
    own: Any = engine.generate

    def timed(*arguments: Any) -> Any:
        begun = time.perf_counter()
        try:
            return own(*arguments)
        finally:
            inner.append(time.perf_counter() - begun)

    engine.generate = timed  # type: ignore[method-assign]
    whole = {"through the strategy": lambda: strategy.gather_and_generate(sampling, drawn, sleep_engine=False)}
    return {**measured(whole, rounds), "the engine's own": statistics.median(inner[1:])}


def ways(
    strategy: StrategyBase, engine: RolloutEngine, actor: torch.nn.Module, weights: list[tuple[str, torch.Tensor]]
) -> dict[str, Callable[[], object]]:
    """Ways of the weights."""
    return {
        "plain copy": lambda: [new_like(tensor).copy_(tensor) for _, tensor in weights],
        "copy into used memory": lambda: [tensor.clone() for _, tensor in weights],
        "into the engine": lambda: engine.update_weights([*pieces(weights, strategy.config.weight_sync_bucket_bytes)]),
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


def measured(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one round that does not count; every other round goes the other way about."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in list(ways.items())[:: -1 if number % 2 else 1]:
            begun = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("--strategy", default="fake", help="fake, fsdp or deepspeed, which is ZeRO-3")
    parser.add_argument("--rounds", type=int, default=8, help="of syncs")
    parser.add_argument("--generations", type=int, default=3, help="rounds of generating")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
