"""What a rank does in the tests: functions that `workers` call in their processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import training
from programs import DECAY, RATE, Observed, Program, mixed
from torch import nn

from lightrft.deepspeed import DeepspeedStrategy


class Unkept(DeepspeedStrategy):
    """Treats small models like large ones: stage 3 keeps no parameter whole, and buckets fill up."""

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

    strategy_class = DeepspeedStrategy if persist else Unkept
    batch = program.accumulation_steps * int(os.environ["WORLD_SIZE"])
    made = strategy_class(
        device="cpu", max_norm=program.max_norm, train_batch_size=batch, **{"bf16": False, **settings}
    )
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
        results = training.run(program, made, model, optimizer, scheduler)
        return Observed(
            parameters=training.full_parameters(made, model),
            norms=[result.grad_norm for result in results if result.applied or result.skipped],
        )
