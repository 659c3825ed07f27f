"""The time of a weight sync, compared with one call per tensor and a plain copy; and of generation through a strategy,
compared with the engine alone.

``python benchmarks/weight_sync.py ENGINE [--strategy NAME] [--rounds N]``; under torchrun for several ranks, with one engine
per rank. The weights have SmolLM2-135M's shapes, in bf16. The rounds alternate, so that other load on the machine affects all
measurements equally.
"""

import mmap
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from measure import Goal, Report, interleaved, parser
from models import save_smollm2, smollm2

from lightrft.engines.sglang.shared_memory import pieces
from lightrft.strategy import RolloutEngine, Sampling, StrategyBase, get_strategy

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 32


def main() -> int:
    """Measure and report."""
    arguments = parser(__doc__, rounds=8)
    arguments.add_argument("engine")
    arguments.add_argument("--strategy", default="fake", help="fake, fsdp or deepspeed (ZeRO-3)")
    arguments.add_argument("--generations", type=int, default=3, help="rounds of generation")
    args = arguments.parse_args()
    settings = {
        "strategy": args.strategy,
        "zero_stage": 3,
        "bf16": True,
        "engine_type": args.engine,
        "device": args.device,
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:  # each rank has its own folder
        source = {"pretrain": str(save_smollm2(Path(folder))), "bf16": True}  # between ranks, only rank 0 would write
        strategy = stack.enter_context(get_strategy(settings))
        actor: Any = smollm2(torch.bfloat16)
        optimizer = strategy.create_optimizer(actor, lr=1e-5)
        actor, _, _ = strategy.prepare((actor, optimizer, None))
        engine = strategy.setup_inference_engine(source, args.engine, actor=actor)
        assert engine is not None
        weights = weights_of(strategy, actor)
        size, ranks = sum(tensor.nbytes for _, tensor in weights), strategy.world_size
        report = Report(args.output, 0 if strategy.is_rank_0() else 1)
        case = f"sync, {args.strategy}, {ranks} {'rank' if ranks == 1 else 'ranks'}, {args.engine}"
        report.add(case, "weights", [size / 1e6], unit="MB")
        seconds = interleaved(sync_variants(strategy, engine, actor, weights), args.rounds, strategy.device)
        report.times(case, seconds)
        goals = {"engine update": Goal(2.5)} if ranks == 1 else {"strategy sync": Goal(4)}
        report.compare(case, seconds, "plain copy", goals)
        goal = Goal(8, at_least=True) if args.engine == "sglang" and ranks == 1 else None
        report.compare(
            case,
            _only(seconds, "one tensor per call", "engine update"),
            "engine update",
            {"one tensor per call": goal} if goal else None,
        )
        if ranks == 1:  # several ranks would compete for the CPUs
            seconds = generation(strategy, engine, actor.config.vocab_size, args.generations)
            case = f"generate, {args.strategy}, {args.engine}"
            report.times(case, seconds)
            report.compare(case, seconds, "engine alone", {"strategy": Goal(1.01)})
    return 0


def _only(seconds: dict[str, list[float]], *names: str) -> dict[str, list[float]]:
    return {name: seconds[name] for name in names}


def generation(strategy: StrategyBase, engine: RolloutEngine, vocabulary: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of `gather_and_generate` for `PROMPTS` prompts, and of its engine's `generate`.

    The same calls measure both: the difference is smaller than the variation between calls.
    """
    prompts = torch.randint(
        10, vocabulary, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)
    ).tolist()
    sampling = Sampling(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    inner: list[float] = []
    generate: Any = engine.generate

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return generate(*arguments)
        finally:
            inner.append(time.perf_counter() - start)

    engine.generate = timed  # type: ignore[method-assign]
    outer = {"strategy": lambda: strategy.gather_and_generate(sampling, prompts, sleep_engine=False)}
    return {**interleaved(outer, rounds, strategy.device), "engine alone": inner[1:]}


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


if __name__ == "__main__":
    sys.exit(main())
