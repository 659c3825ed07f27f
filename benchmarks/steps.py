"""The time of an update through a strategy, the bare backend, Accelerate and Lightning Fabric.

``python steps.py fake`` or ``torchrun --nproc-per-node 2 steps.py zero0|zero1|zero2|zero3|fsdp``, with four ranks ``hsdp``. All
loops (loops.py) train the same model on the same batches in one process, in turn. With ``--denominators``, both loops go
through the strategy, one without denominators and one with them. There both clip every update: to divide by the denominators, an update multiplies its
gradient by one factor, which is that of clipping too. ``--profile`` shows which files of the layer take time.
"""

import cProfile
import os
import pstats
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from loops import MAX_NORM, Update, accelerate, fabric, fsdp, plain, with_strategy, zero
from measure import Action, Goal, Report, collectives_of, interleaved, parser
from models import smollm2
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.strategy import get_strategy

LOW_NORM = 1e-6
"""Every gradient is clipped to it."""
WARM_UP = 5
"""Rounds before those that count: at most a quarter of these, and at least one."""
PROFILED = 200
"""Updates that `profile` makes."""
LIBRARIES = {"Accelerate": "accelerate", "Fabric": "lightning_fabric"}
"""The modules of contenders that may be missing."""
SETTINGS: dict[str, dict[str, object]] = {
    "fake": {"strategy": "fake"},
    "fsdp": {"strategy": "fsdp"},
    "hsdp": {"strategy": "fsdp", "fsdp_shard_size": 2},
    **{f"zero{stage}": {"strategy": "deepspeed", "zero_stage": stage} for stage in range(4)},
}


def main() -> int:
    arguments = parser(__doc__, rounds=100)
    arguments.add_argument("strategy", choices=list(SETTINGS))
    arguments.add_argument("--size", choices=list(SIZES), default="20 ms")
    arguments.add_argument("--accumulation", type=int, default=1, help="micro-batches of an update")
    arguments.add_argument("--denominators", action="store_true", help="compare updates with and without denominators")
    arguments.add_argument(
        "--profile", action="store_true", help="report where the time of an update through the strategy goes"
    )
    args = arguments.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        **SETTINGS[args.strategy], "device": args.device, "bf16": False, "train_batch_size": ranks * args.accumulation,
        "micro_train_batch_size": 1, "max_norm": LOW_NORM if args.denominators else MAX_NORM,
    }  # fmt: skip
    with get_strategy(settings) as strategy:
        make, batch = SIZES[args.size]
        batches = [batch().to(strategy.device)] * args.accumulation
        report = Report(args.output, 0 if strategy.is_rank_0() else 1)
        case = f"update, {args.strategy}, {args.size}" + (f", K={args.accumulation}" if args.accumulation > 1 else "")
        if args.profile:
            profile(report, case, partial(with_strategy(strategy, make()), batches))
            return 0
        if args.denominators:
            updates = {
                "without": with_strategy(strategy, make()),
                "denominators": with_strategy(strategy, make(), denominators=True),
            }
        else:
            makers = contenders(args.strategy, args.accumulation, ranks)
            bare = {name: maker(make().to(strategy.device)) for name, maker in makers.items()}
            updates = {**bare, "ours": with_strategy(strategy, make())}
        actions = {name: partial(update, batches) for name, update in updates.items()}
        warm_up = max(1, min(WARM_UP, args.rounds // 4))
        show(report, case, interleaved(actions, args.rounds, strategy.device, warm_up=warm_up), args.size)
        if args.size == "1 ms" and ranks > 1:
            show_collectives(report, case, {name: collectives_of(action) for name, action in actions.items()})
    return 0


def contenders(strategy: str, accumulation: int, ranks: int) -> dict[str, Callable[[nn.Module], Update]]:
    """The loops to compare with, the bare backend first: for ZeRO-0, plain data parallelism by DDP.

    Libraries that are not installed are left out. Accelerate has no FSDP2 on CPUs, Lightning Fabric no ZeRO.
    """
    loops: dict[str, Callable[[nn.Module], Update]]
    if strategy == "fsdp":
        loops = {"bare": fsdp, "Fabric": fabric(sharded=True)}
    elif strategy == "hsdp":
        loops = {"bare": partial(fsdp, shards=2)}
    elif strategy in ("fake", "zero0"):
        name = "DDP" if strategy == "zero0" else "bare"
        loops = {name: plain, "Accelerate": accelerate(accumulation), "Fabric": fabric()}
    else:
        stage = int(strategy.removeprefix("zero"))
        loops = {"bare": zero(stage, accumulation), "Accelerate": accelerate(accumulation, stage=stage)}
    return {name: loop for name, loop in loops.items() if name not in LIBRARIES or find_spec(LIBRARIES[name])}


def show(report: Report, case: str, seconds: dict[str, list[float]], size: str) -> None:
    """Report times, ratios to the first loop, and what each adds to it."""
    reference = next(iter(seconds))
    report.times(case, seconds)
    bound = None if size == "1 ms" else Goal(1.01)
    report.compare(case, seconds, reference, {"ours": bound, "denominators": bound} if bound else None)
    if size == "1 ms" and "ours" in seconds:
        added = {
            name: [1000 * (own - bare) for own, bare in zip(taken, seconds[reference], strict=True)]
            for name, taken in seconds.items()
            if name != reference
        }
        for name, values in added.items():
            report.add(case, f"{name} - {reference}", values, unit="ms")
        peers = {name: median(values) for name, values in added.items() if name != "ours"}
        if peers:
            best = min(peers, key=lambda name: peers[name])
            more = [own - other for own, other in zip(added["ours"], added[best], strict=True)]
            report.add(case, "added by ours - by the best of the others", more, unit="ms", goal=Goal(0.0))


def show_collectives(report: Report, case: str, counts: dict[str, int]) -> None:
    """Report the collectives of an update; this layer may add one to those of the bare backend."""
    reference, *_ = counts.values()
    for name, count in counts.items():
        report.add(case, name, [count], unit="collectives", goal=Goal(reference + 1) if name == "ours" else None)


def profile(report: Report, case: str, action: Action) -> None:
    """Report the time that an update spends in each file of this layer, and in the collectives that it calls.

    Time in other functions that a file calls is left out: the bare backend needs most of it, too. The profiler itself takes
    a part of these times, which is the larger the shorter the functions are.
    """
    for _ in range(WARM_UP):
        action()
    with cProfile.Profile() as profiler:
        for _ in range(PROFILED):
            action()
    seconds: Counter[str] = Counter()
    functions: dict[tuple[str, int, str], Any] = vars(pstats.Stats(profiler))["stats"]
    for (path, *_), (_, _, own, _, callers) in functions.items():
        if "lightrft" in path:
            seconds["/".join(Path(path).parts[-2:])] += own
        elif path.endswith(("c10d_logger.py", "distributed_c10d.py")):  # the first wraps the functions of the second
            seconds["collectives"] += sum(time for (caller, *_), (*_, time) in callers.items() if "lightrft" in caller)
    report.add(case, "profile, all", [1e6 * seconds.total() / PROFILED], unit="us")
    for name, taken in seconds.most_common(8):
        report.add(case, f"profile, {name}", [1e6 * taken / PROFILED], unit="us")


# Models and data


def language_model() -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape))


def small_language_model() -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape))


def tokens(sequences: int, length: int, words: int) -> torch.Tensor:
    return (torch.arange(sequences * length) % words).view(sequences, length)


SIZES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "1 ms": (small_language_model, partial(tokens, 1, 8, 64)),
    "20 ms": (language_model, partial(tokens, 2, 64, 1024)),
    "large": (partial(smollm2, torch.float32), partial(tokens, 1, 64, 49152)),
}
"""Named after the least time of an update on one CPU core, without ranks; "large" is SmolLM2-135M's shape on 64 tokens."""


if __name__ == "__main__":
    sys.exit(main())
