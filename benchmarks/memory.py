"""Peak memory of training, saving, exporting and syncing weights, compared with the same work without this layer.

``python memory.py``. Each contender runs in a separate process, with SmolLM2-135M's shape in fp32; what is reported is the
peak of its resident memory above the memory before, as a multiple of the weights.
"""

import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loops import adamw, loss_of
from measure import Report, parser
from models import save_smollm2, smollm2

from lightrft.strategy import get_fake_strategy

Work = Callable[[], object]


def main() -> int:
    args = parser(__doc__, rounds=1).parse_args()
    report = Report(args.output)
    weights = sum(parameter.nbytes for parameter in smollm2(torch.float32).parameters())
    for case, contenders in CASES.items():
        peaks = {name: statistics_of(make, args.rounds) for name, make in contenders.items()}
        for name, values in peaks.items():
            report.add(f"peak memory, {case}", name, [value / weights for value in values], unit="x")
        bare, *others = peaks
        for other in others:
            shares = [ours / plain for ours, plain in zip(peaks[other], peaks[bare], strict=True)]
            report.add(f"peak memory, {case}", f"{other} / {bare}", shares)
    return 0


def statistics_of(make: Callable[[Path], Work], rounds: int) -> list[int]:
    return [peak_of(make) for _ in range(rounds)]


def peak_of(make: Callable[[Path], Work]) -> int:
    """Bytes at the peak of the work, above what the process held before, in a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(make, sender))
    process.start()
    sender.close()
    try:
        peak: int = receiver.recv()
    finally:
        process.join()
    return peak


def _measure(make: Callable[[Path], Work], sender: Any) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = make(Path(folder))
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # resets the peak; where that is not allowed, there is nothing to report
        work()
        sender.send(memory("VmHWM") - before)


def memory(field: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` is the current size, ``VmHWM`` the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


# Training


def _batch() -> torch.Tensor:
    return torch.arange(2 * 64).view(2, 64)


def train_bare(_: Path) -> Work:
    model = smollm2(torch.float32)
    optimizer = adamw(model)

    def work() -> None:
        for _ in range(2):
            loss_of(model, _batch()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return work


def _prepared(folder: Path) -> tuple[Any, Any, Any]:
    strategy = get_fake_strategy(bf16=False, train_batch_size=1)
    model: Any = smollm2(torch.float32)
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-4), None))
    return strategy, model, optimizer


def _step(strategy: Any, model: Any, optimizer: Any) -> None:
    strategy.backward(loss_of(model, _batch()), model, optimizer)
    strategy.optimizer_step(optimizer, model)


def train_ours(folder: Path) -> Work:
    strategy, model, optimizer = _prepared(folder)
    return lambda: [_step(strategy, model, optimizer) for _ in range(2)]


# Saving and exporting


def save_bare(folder: Path) -> Work:
    train_and = smollm2(torch.float32)
    optimizer = adamw(train_and)
    loss_of(train_and, _batch()).backward()
    optimizer.step()
    optimizer.zero_grad()
    state = {"model": train_and.state_dict(), "optimizer": optimizer.state_dict()}
    return lambda: torch.save(state, folder / "checkpoint.pt")


def save_ours(folder: Path) -> Work:
    strategy, model, optimizer = _prepared(folder)
    _step(strategy, model, optimizer)
    return lambda: strategy.save_ckpt(model, folder / "checkpoints")


def export_bare(folder: Path) -> Work:
    model: Any = smollm2(torch.float32)
    return lambda: model.save_pretrained(folder / "model")


def export_ours(folder: Path) -> Work:
    strategy, model, _ = _prepared(folder)
    return lambda: strategy.save_model(model, None, folder / "model")


# Syncing


def sync_bare(folder: Path) -> Work:
    """Copy the weights into another model, as a script without engines does."""
    model, engine = smollm2(torch.float32), smollm2(torch.bfloat16)
    return lambda: engine.load_state_dict(model.state_dict())


def sync_ours(folder: Path) -> Work:
    strategy, model, _ = _prepared(folder)
    source = {"pretrain": str(save_smollm2(folder / "source")), "bf16": True}
    strategy.setup_inference_engine(source, "transformers", actor=model)
    return lambda: strategy.update_engine_weights(model)


CASES: dict[str, dict[str, Callable[[Path], Work]]] = {
    "two updates": {"bare": train_bare, "ours": train_ours},
    "save": {"torch.save": save_bare, "ours": save_ours},
    "export": {"save_pretrained": export_bare, "ours": export_ours},
    "sync": {"load_state_dict": sync_bare, "ours": sync_ours},
}


if __name__ == "__main__":
    sys.exit(main())
