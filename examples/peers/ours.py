"""This project's layer: FakeStrategy, FSDP2 and DeepSpeed ZeRO-2.

Settings other than defaults: `device="cpu"` and `bf16=False`; `max_norm=None` where a promise does not ask for clipping; `drop_last=False`
for data.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - before workers are forked: DeepSpeed does, for any optimizer
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightrft.deepspeed
import lightrft.fsdp  # noqa: F401 - like deepspeed
from lightrft.conformance.peers import LoopSettings, ReduceOp, Update
from lightrft.strategy import get_strategy


class Ours:
    """A loop over a strategy."""

    def __init__(self, settings: LoopSettings, **chosen: Any) -> None:
        world = int(os.environ["WORLD_SIZE"])
        batch = {"train_batch_size": settings.accumulation_steps * world, "micro_train_batch_size": 1}
        self.strategy = get_strategy({"device": "cpu", "bf16": False, "max_norm": settings.max_norm, **batch, **chosen})
        if settings.timeout_seconds:
            self.strategy.setup_distributed(timedelta(seconds=settings.timeout_seconds))
        self.trained: dict[nn.Module, tuple[Optimizer, LRScheduler | None]] = {}
        self.last = False

    def prepare(
        self,
        model: nn.Module,
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> nn.Module:
        optimizer = make_optimizer(model.parameters())
        scheduler = make_scheduler(optimizer) if make_scheduler else None
        model, optimizer, scheduler = self.strategy.prepare((model, optimizer, scheduler))
        self.trained[model] = optimizer, scheduler
        return model

    def batches(
        self, dataset: Any, *, batch_size: int, shuffle: bool = False, epoch: int = 0, consumed: int = 0
    ) -> Iterable[torch.Tensor]:
        loader = self.strategy.setup_dataloader(dataset, batch_size, shuffle=shuffle, drop_last=False)
        loader.set_epoch(epoch, consumed * batch_size * self.strategy.world_size)
        return loader

    @contextmanager
    def micro_batch(self, model: nn.Module, *, last: bool = False) -> Iterator[None]:
        self.last = last
        yield

    def backward(self, loss: torch.Tensor, model: nn.Module, *, retain_graph: bool = False) -> None:
        self.strategy.backward(loss, model, self.trained[model][0], retain_graph=retain_graph)

    def step(self, model: nn.Module) -> Update | None:
        optimizer, scheduler = self.trained[model]
        result = self.strategy.optimizer_step(optimizer, model, scheduler, boundary=True if self.last else None)
        return Update(norm=result.grad_norm) if result.applied or result.skipped else None

    def weights(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        stream = self.strategy.full_parameters(model, dtype=torch.float32)
        return {name: tensor.clone() for bucket in stream for name, tensor in bucket}

    def learning_rate(self, model: nn.Module) -> float:
        return float(self.trained[model][0].param_groups[0]["lr"])

    def all_reduce(self, value: Any, op: ReduceOp) -> Any:
        return self.strategy.all_reduce(value, op)

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return self.strategy.all_gather(rows)

    def save(self, folder: Path, model: nn.Module, progress: Mapping[str, int]) -> None:
        self.strategy.save_ckpt(model, folder.parent, tag=folder.name, client_state=dict(progress))

    def load(self, folder: Path, model: nn.Module) -> Mapping[str, int]:
        return self.strategy.load_ckpt(model, folder.parent, tag=folder.name)[1]

    def close(self) -> None:
        self.strategy.close()


fake = partial(Ours, strategy="fake")
fsdp = partial(Ours, strategy="fsdp")
zero2 = partial(Ours, strategy="deepspeed", zero_stage=2)
