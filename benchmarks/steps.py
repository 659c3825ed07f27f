"""The time of a training step through a strategy, compared with the same loop written on the bare backend.

``python steps.py fake`` or ``torchrun --nproc-per-node 2 steps.py fsdp|zero2|zero3``. Both loops train the same model on
the same batches, with clipping. They alternate in one process, so that other load on the machine affects both alike.
With ``--denominators``, both loops go through the strategy, one without denominators and one with them. Both clip: to divide
by the denominators, an update multiplies its gradient by one factor, which is that of clipping too.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
from models import seconds_of, smollm2
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.strategy import StrategyBase, get_strategy

Step = Callable[[torch.Tensor], object]

MAX_NORM, RATE = 1.0, 1e-4
LOW_NORM = 1e-6
"""Every gradient is clipped to it."""
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategy", choices=list(BARE))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--large", action="store_true", help="SmolLM2-135M's shape on 4,096 tokens, instead of a small model"
    )
    parser.add_argument("--denominators", action="store_true", help="Compare updates with and without denominators")
    args = parser.parse_args()
    more = {"device": args.device, **({"max_norm": LOW_NORM} if args.denominators else {})}
    with get_strategy({**settings(args.strategy), **more}) as strategy:
        make, batch = LARGE if args.large else MODELS[args.strategy]
        if args.denominators:
            steps = {
                "without": with_strategy(strategy, make()),
                "with denominators": with_strategy(strategy, make(), denominators=True),
            }
        else:
            steps = {"bare": BARE[args.strategy](make().to(strategy.device)), "ours": with_strategy(strategy, make())}
        seconds = alternate(steps, batch().to(strategy.device), args.rounds)
        report(strategy, args.strategy, seconds)


def settings(name: str) -> dict[str, object]:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = {"train_batch_size": ranks, "micro_train_batch_size": 1}
    return {**SETTINGS[name], **batch, "bf16": False, "max_norm": MAX_NORM}


def alternate(steps: dict[str, Step], batch: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step; the first of a pair alternates too."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM_UP + rounds):
        order = list(steps.items())
        for name, step in order if turn % 2 else reversed(order):
            seconds[name].append(seconds_of(partial(step, batch), batch.device))
    return {name: taken[WARM_UP:] for name, taken in seconds.items()}


def report(strategy: StrategyBase, name: str, seconds: dict[str, list[float]]) -> None:
    """Print the medians of the two loops, and the second over the first."""
    (first, baselines), (second, others) = seconds.items()
    bare, ours = 1000 * median(baselines), 1000 * median(others)
    ratios = [step / baseline for step, baseline in zip(others, baselines, strict=True)]
    low, middle, high = quantiles(ratios)
    strategy.print(
        f"step, {name}, {strategy.world_size} rank(s): {first} {bare:.3f} ms, {second} {ours:.3f} ms "
        f"({ours - bare:+.3f} ms), ratio {middle:.3f} [{low:.3f}, {high:.3f}] of {len(ratios)} pairs"
    )


# The loops


def with_strategy(strategy: StrategyBase, model: nn.Module, *, denominators: bool = False) -> Step:
    """The loop with a strategy."""
    optimizer = strategy.create_optimizer(model, lr=RATE)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))

    def step(batch: torch.Tensor) -> None:
        items = batch.numel() if denominators else None
        strategy.backward(loss_of(model, batch), model, optimizer, denominator=items)
        strategy.optimizer_step(optimizer, model)

    return step


def by_hand(model: nn.Module) -> Step:
    """The loop in plain torch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)

    def step(batch: torch.Tensor) -> None:
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fsdp_by_hand(model: nn.Module) -> Step:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return by_hand(model)


def zero_by_hand(stage: int, model: nn.Module) -> Step:
    import deepspeed

    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)

    def step(batch: torch.Tensor) -> None:
        engine.backward(loss_of(engine, batch))
        engine.step()

    return step


# Models and data


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    if batch.is_floating_point():
        return model(batch).square().mean()
    return model(batch, labels=batch).loss


def language_model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, **shape))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))


def tokens(sequences: int = 2, length: int = 64) -> torch.Tensor:
    return torch.arange(sequences * length).view(sequences, length)


def rows() -> torch.Tensor:
    return torch.randn(32, 256, generator=torch.Generator().manual_seed(0))


MODELS = {
    "fake": (perceptron, rows),
    "fsdp": (language_model, tokens),
    "zero2": (language_model, tokens),
    "zero3": (language_model, tokens),
}
LARGE = (partial(smollm2, torch.float32), partial(tokens, 8, 512))
BARE: dict[str, Callable[[nn.Module], Step]] = {
    "fake": by_hand,
    "fsdp": fsdp_by_hand,
    "zero2": partial(zero_by_hand, 2),
    "zero3": partial(zero_by_hand, 3),
}
SETTINGS: dict[str, dict[str, object]] = {
    "fake": {"strategy": "fake"},
    "fsdp": {"strategy": "fsdp"},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
}


if __name__ == "__main__":
    sys.exit(main())
