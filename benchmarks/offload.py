"""The memory that offloading a trained model, and an engine that sleeps, give back.

``python benchmarks/offload.py fake|fsdp|zero3 [--device cuda]``. Prints what the process holds after each action: resident
memory, and on CUDA what torch has allocated and what all processes use on the device.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loops import loss_of
from measure import Report, parser
from memory import memory
from models import save_smollm2, smollm2
from steps import SETTINGS

from lightrft.strategy import StrategyBase, get_strategy


def main() -> int:
    arguments = parser(__doc__, rounds=1)
    arguments.add_argument("strategy", choices=["fake", "fsdp", "zero3"])
    arguments.add_argument("--engine", default="transformers")
    args = arguments.parse_args()
    report = Report(args.output)
    settings = {
        **SETTINGS[args.strategy],
        "device": args.device,
        "engine_type": args.engine,
        "enable_engine_sleep": True,
    }
    with tempfile.TemporaryDirectory() as folder, get_strategy({**settings, "bf16": False}) as strategy:
        for name, action in actions(strategy, args.engine, save_smollm2(Path(folder))).items():
            action()
            strategy.sync_and_clear_cache()
            strategy.report_memory(f"{args.strategy}, {name}")
            report.add(f"offload, {args.strategy}, {name}", "resident", [memory("VmRSS") / 2**20], unit="MiB")
    return 0


def actions(strategy: StrategyBase, engine: str, source: Path) -> dict[str, Callable[[], object]]:
    """Named actions in the order in which a trainer does them."""
    made: dict[str, Any] = {}

    def train() -> None:
        model: Any = smollm2(torch.float32)
        optimizer = strategy.create_optimizer(model, lr=1e-5)
        made["model"], made["optimizer"], _ = strategy.prepare((model, optimizer, None))
        step()

    def step() -> None:
        batch = torch.arange(2 * 64, device=strategy.device).view(2, 64)
        strategy.backward(loss_of(made["model"], batch), made["model"], made["optimizer"])
        strategy.optimizer_step(made["optimizer"], made["model"], boundary=True)

    def setup_engine() -> None:
        strategy.setup_inference_engine({"pretrain": str(source), "bf16": True}, engine, actor=made["model"])

    return {
        "empty": lambda: None,
        "one update": train,
        "optimizer offloaded": lambda: strategy.maybe_offload_optimizer(made["optimizer"]),
        "model offloaded": lambda: strategy.offload_model(made["model"]),
        "model reloaded": lambda: strategy.reload_model(made["model"]),
        "optimizer reloaded": lambda: strategy.maybe_load_optimizer(made["optimizer"]),
        "another update": step,
        "engine made": setup_engine,
        "engine asleep": strategy.maybe_sleep_inference_engine,
        "engine awake": strategy.wakeup_inference_engine,
    }


if __name__ == "__main__":
    sys.exit(main())
