"""What a rank does in the tests: functions that `ds_workers` calls in its processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ds_models import DECAY, RATE, Observed, Program, mixed
from torch import nn
from torch.optim import Optimizer

from lightrft.deepspeed import DeepspeedStrategy
from lightrft.strategy import StepResult


class Unkept(DeepspeedStrategy):
    """Made for large models, and small ones are treated alike: stage 3 keeps none whole, and buckets fill up."""

    def get_ds_train_config(self, is_actor: bool = False) -> dict[str, Any]:
        settings = _without_persistence(super().get_ds_train_config(is_actor))
        settings["zero_optimization"]["reduce_bucket_size"] = 300
        return settings

    def get_ds_eval_config(self, offload: bool = False) -> dict[str, Any]:
        return _without_persistence(super().get_ds_eval_config(offload))


def _without_persistence(settings: dict[str, Any]) -> dict[str, Any]:
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


@contextmanager
def strategy(program: Program, persist: bool = False, **settings: Any) -> Iterator[DeepspeedStrategy]:
    """A strategy for ``program``, closed in the end."""
    import os

    kind = DeepspeedStrategy if persist else Unkept
    batch = program.window * int(os.environ["WORLD_SIZE"])
    made = kind(device="cpu", max_norm=program.max_norm, train_batch_size=batch, **{"bf16": False, **settings})
    with made:
        yield made


def train(program: Program, wrap_first: bool = False, persist: bool = True, **settings: Any) -> Observed:
    """Run ``program``; every rank's model begins with other weights, of which rank 0's count."""
    with strategy(program, persist, **settings) as made:
        model: nn.Module = mixed(3 + made.get_rank())
        if wrap_first:
            model = made.prepare_model(model, is_training=True)
            optimizer = made.create_optimizer(model, lr=RATE, weight_decay=DECAY)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        else:
            optimizer = made.create_optimizer(model, lr=RATE, weight_decay=DECAY)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
            model, optimizer, scheduler = made.prepare((model, optimizer, scheduler))
        results = run(program, made, model, optimizer, scheduler)
        return Observed(
            parameters=whole(made, model), norms=[it.grad_norm for it in results if it.applied or it.skipped]
        )


def run(
    program: Program, made: DeepspeedStrategy, model: nn.Module, optimizer: Optimizer, scheduler: Any = None
) -> list[StepResult]:
    """Run ``program`` on a prepared model."""
    results = []
    for update, micro, last in program.micro_batches():
        backward(program, made, model, optimizer, update, micro)
        boundary = last if program.lengths else None
        schedule = scheduler if program.decaying_rate else None
        results.append(made.optimizer_step(optimizer, model, schedule, boundary=boundary))
    return results


def backward(
    program: Program, made: DeepspeedStrategy, model: nn.Module, optimizer: Optimizer, update: int, micro: int
) -> None:
    """The losses of one micro-batch, in one of the ways in which trainers have them."""

    def loss(second: bool = False) -> torch.Tensor:
        value = program.loss(model, update, micro, made.get_rank(), second)
        poisoned = update in program.poisoned and made.get_rank() == made.world_size - 1
        return value * float("nan") if poisoned else value

    if program.losses == "one":
        made.backward(loss(), model, optimizer)
    elif program.losses == "forward, backward, forward, backward":
        made.backward(loss(), model, optimizer)
        made.backward(loss(second=True), model, optimizer)
    elif program.losses == "forward, forward, backward, backward":
        first, other = loss(), loss(second=True)
        made.backward(first, model, optimizer)
        made.backward(other, model, optimizer)
    elif program.losses == "forward, forward, one backward":
        made.backward(loss() + loss(second=True), model, optimizer)
    else:
        raise ValueError(program.losses)


def whole(made: DeepspeedStrategy, model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """All parameters and buffers under their saved names."""
    return {name: it.clone() for bucket in made.full_parameters(model, dtype=dtype) for name, it in bucket}
