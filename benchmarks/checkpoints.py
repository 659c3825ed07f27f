"""Saving, loading and exporting, compared with plain files of the same size and with torch.save, DCP, Accelerate and DeepSpeed.

The model has SmolLM2-135M's shape and AdamW's state, in fp32, in one process. A plain read is into allocated memory, as a
model's is; plain writes are atomic and synced to the disk, as ours are. The others verify nothing when they load, and do not
sync what they write, as save_pretrained does not.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from loops import adamw, zero_engine
from measure import Action, Goal, Report, interleaved, parser
from models import smollm2
from torch.distributed import checkpoint as dcp

from lightrft.strategy import FakeStrategy, get_fake_strategy


def main() -> int:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: the temporary folder")
    args = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lightrft-bench-", dir=args.folder))
    try:
        measure(Report(args.output), folder, args.rounds, args.device)
    finally:
        shutil.rmtree(folder)
    return 0


def prepared(strategy: FakeStrategy) -> Any:
    """The model and its optimizer state after one update."""
    model: Any = smollm2(torch.float32)
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-3), None))
    tokens = torch.arange(8, device=strategy.device)[None]
    strategy.backward(model(tokens, labels=tokens).loss, model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return model


def write(path: Path, data: memoryview) -> None:
    """Write a new file with fsync and move it to ``path``, as a save does."""
    temporary_path = path.with_suffix(".writing")
    with temporary_path.open("xb", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    temporary_path.replace(path)


def read(path: Path, target: memoryview) -> None:
    """Read ``path`` into ``target``."""
    with path.open("rb", buffering=0) as file:
        while target:
            target = target[file.readinto(target) :]


def drop_from_page_cache(folder: Path) -> None:
    """Drop the files in ``folder`` from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # only pages that are on the disk can be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(report: Report, folder: Path, rounds: int, device: str) -> None:
    """Measure saving, loading and exporting, by this layer and by others."""
    with (
        get_fake_strategy(bf16=False, train_batch_size=1, device=device) as blocking,
        get_fake_strategy(bf16=False, train_batch_size=1, device=device, async_ckpt=True) as background,
    ):
        model, other = prepared(blocking), prepared(background)
        checkpoint = blocking.save_ckpt(model, folder / "ours", tag="t")
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        report.add("checkpoint", "size", [size / 1e9], unit="GB")
        data = memoryview(torch.randint(256, (size,), dtype=torch.uint8).numpy())
        background.save_ckpt(other, folder / "async", tag="t")  # the first save allocates memory for copies
        optimizer = optimizer_of(model)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        accelerate, deepspeed = Accelerate(folder / "accelerate", device), DeepSpeed(folder / "deepspeed", device)

        def blocked() -> None:
            background.save_ckpt(other, folder / "async", tag="t")

        def load_state() -> None:
            loaded = torch.load(folder / "state.pt")
            model.load_state_dict(loaded["model"])
            optimizer.load_state_dict(loaded["optimizer"])

        saves: dict[str, Action] = {
            "plain write": lambda: write(folder / "plain", data),
            "ours": lambda: blocking.save_ckpt(model, folder / "ours", tag="t"),
            "torch.save": lambda: torch.save(state, folder / "state.pt"),
            "DCP": lambda: dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True),
            "Accelerate": accelerate.save,
            "DeepSpeed": deepspeed.save,
            "ours, async": blocked,
        }
        loads: dict[str, Action] = {
            "plain read": lambda: read(folder / "plain", data),
            "ours": lambda: blocking.load_ckpt(model, folder / "ours"),
            "torch.load": load_state,
            "DCP": lambda: dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True),
            "Accelerate": accelerate.load,
            "DeepSpeed": deepspeed.load,
        }
        seconds = interleaved(saves, rounds, blocking.device, before=lambda: background._checkpoint_saver.finish())
        report.times("save", seconds)
        report.compare("save, speed", seconds, "plain write", {"ours": Goal(0.6, at_least=True)}, inverse=True)
        report.compare(
            "save, time blocked",
            {name: seconds[name] for name in ("ours", "ours, async")},
            "ours",
            {"ours, async": Goal(0.25)},
        )
        for case, before in (("load", lambda: None), ("load, cold cache", lambda: drop_from_page_cache(folder))):
            seconds = interleaved(loads, rounds, blocking.device, before=before)
            report.times(case, seconds)
            report.compare(f"{case}, speed", seconds, "plain read", {"ours": Goal(0.8, at_least=True)}, inverse=True)
        weights = data[: sum(parameter.nbytes for parameter in model.parameters())]
        exports: dict[str, Action] = {
            "plain write": lambda: write(folder / "plain-weights", weights),
            "save_pretrained": lambda: model.save_pretrained(folder / "plain-export"),
            "ours": lambda: blocking.save_model(model, None, folder / "export"),
        }
        seconds = interleaved(exports, rounds, blocking.device)
        report.times("export", seconds)
        report.compare("export", seconds, "plain write")


def optimizer_of(model: Any) -> torch.optim.AdamW:
    """An optimizer with as much state as in the checkpoint, for libraries that take state dicts."""
    optimizer = adamw(model)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0), "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)
        }  # fmt: skip
    return optimizer


class Accelerate:
    """A model and its optimizer state under Accelerate's `save_state` and `load_state`."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder, self._accelerator = str(folder), Accelerator(cpu=device == "cpu")
        model = smollm2(torch.float32)
        model, optimizer = self._accelerator.prepare(model, adamw(model))
        tokens = torch.arange(8, device=device)[None]
        self._accelerator.backward(model(tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()

    def save(self) -> None:
        self._accelerator.save_state(self._folder)

    def load(self) -> None:
        self._accelerator.load_state(self._folder)


class DeepSpeed:
    """A model and its optimizer state under DeepSpeed's `save_checkpoint` and `load_checkpoint`, on one rank without ZeRO."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = str(folder)
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed requires it
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._engine = zero_engine(0, 1, smollm2(torch.float32))
        tokens = torch.arange(8, device=self._engine.device)[None]
        self._engine.backward(self._engine(tokens, labels=tokens).loss)
        self._engine.step()

    def save(self) -> None:
        self._engine.save_checkpoint(self._folder, tag="t")

    def load(self) -> None:
        self._engine.load_checkpoint(self._folder, tag="t")


if __name__ == "__main__":
    sys.exit(main())
