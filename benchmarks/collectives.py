"""The time of small collectives: a dict of 30 numbers reduced, and rows of unequal length gathered.

``torchrun --nproc-per-node 2 collectives.py``. "one call" is a single collective of `torch.distributed` on data that is laid
out in advance, which is the least that any library needs; "a call each" is the loop that scripts write without a library.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from measure import Action, Goal, Report, collectives_of, interleaved, parser

from lightrft.strategy import StrategyBase, get_strategy

NUMBERS, MANY = 30, 100
ROWS, WIDTH = 100, 16


def main() -> int:
    arguments = parser(__doc__, rounds=200)
    args = arguments.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with get_strategy({"strategy": "fsdp", "device": args.device, "train_batch_size": ranks}) as strategy:
        report = Report(args.output, dist.get_rank())
        for case, contenders in cases(strategy).items():
            seconds = interleaved(contenders, args.rounds, strategy.device, warm_up=5)
            report.times(case, seconds)
            report.compare(case, seconds, "one call")
        for numbers in (NUMBERS, MANY):
            metrics = {f"metric {index}": float(index) for index in range(numbers)}
            count = collectives_of(lambda metrics=metrics: strategy.all_reduce(metrics))
            report.add(f"all_reduce, a dict of {numbers} numbers", "ours", [count], unit="collectives", goal=Goal(1))
    return 0


def cases(strategy: StrategyBase) -> Mapping[str, Mapping[str, Action]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    accelerator = Accelerator(cpu=strategy.device.type == "cpu")
    on_gpu = strategy.device.type == "cuda"
    backend = "nccl" if on_gpu else "gloo"
    fabric: Any = Fabric(
        accelerator="gpu" if on_gpu else "cpu", devices=ranks, strategy=DDPStrategy(process_group_backend=backend)
    )
    fabric.launch()
    metrics = {f"metric {index}": float(index + rank) for index in range(NUMBERS)}
    tensors = {name: torch.tensor(value, device=strategy.device) for name, value in metrics.items()}
    stacked_N = torch.tensor(list(metrics.values()), device=strategy.device)
    rows_RW = torch.randn(ROWS - rank, WIDTH, device=strategy.device)

    def one_gather() -> None:
        padded_RW = torch.nn.functional.pad(rows_RW, (0, 0, 0, ROWS - len(rows_RW)))
        dist.all_gather([torch.empty_like(padded_RW) for _ in range(ranks)], padded_RW)

    def accelerate_gather() -> None:
        accelerator.gather(accelerator.pad_across_processes(rows_RW))

    return {
        f"all_reduce, a dict of {NUMBERS} numbers": {
            "one call": lambda: dist.all_reduce(stacked_N.clone()),
            "a call each": lambda: [dist.all_reduce(tensor.clone()) for tensor in tensors.values()],
            "ours": lambda: strategy.all_reduce(metrics),
            "Accelerate": lambda: accelerator.reduce(tensors, reduction="mean"),
            "Fabric": lambda: fabric.all_reduce({name: tensor.clone() for name, tensor in tensors.items()}),
        },
        "all_gather, rows of unequal length": {
            "one call": one_gather,
            "ours": lambda: strategy.all_gather(rows_RW),
            "Accelerate": accelerate_gather,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
