"""Accelerate, as its documentation writes a loop: DistributedDataParallel, and DeepSpeed ZeRO-2.

Settings other than defaults: gloo; `use_seedable_sampler` with `data_seed=0`; `find_unused_parameters` where a promise leaves modules
unused. For DeepSpeed: `cpu=False`, without which it is ignored; `zero_allow_untested_optimizer` and a micro-batch size, without
which it raises errors; and `gradient_clipping=0.0` where a promise does not ask for clipping.
"""

from datetime import timedelta

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - before workers are forked: DeepSpeed does, for any optimizer
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    gather_object,
)
from deepspeed.accelerator import get_accelerator
from torch.utils.data import DataLoader

from lightrft.conformance.peers import LoopSettings, NotOffered, Update

DOCS = "https://huggingface.co/docs/accelerate/v1.15.0/en/package_reference/accelerator#accelerate.Accelerator"

MODELS_DOCS = "https://huggingface.co/docs/accelerate/v1.15.0/en/usage_guides/deepspeed_multiple_model"
get_accelerator().create_op_builder(
    "ShareMemCommBuilder"
).load()  # before workers are forked, each of which would build it


class Progress:
    """The script's numbers, which Accelerate saves with the rest."""

    def __init__(self):
        self.numbers = {}

    def state_dict(self):
        return self.numbers

    def load_state_dict(self, state):
        self.numbers = state


class AccelerateDDP:
    """Accelerate with DistributedDataParallel."""

    deepspeed = False

    def __init__(self, settings: LoopSettings) -> None:
        self.settings, self.trained, self.progress = settings, {}, Progress()
        timeout = timedelta(seconds=settings.timeout_seconds) if settings.timeout_seconds else None
        self.accelerator = Accelerator(
            cpu=not self.deepspeed,  # with cpu=True, Accelerate ignores DeepSpeed
            gradient_accumulation_steps=settings.accumulation_steps,
            deepspeed_plugin=self.plugin(settings),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
            kwargs_handlers=[
                InitProcessGroupKwargs(backend="gloo", timeout=timeout),
                DistributedDataParallelKwargs(find_unused_parameters=settings.unused_parameters),
            ],
        )
        self.accelerator.register_for_checkpointing(self.progress)

    def plugin(self, settings):
        return None

    def prepare(self, model, make_optimizer, make_scheduler=None):
        optimizer = make_optimizer(model.parameters())
        if make_scheduler is None:
            model, optimizer = self.accelerator.prepare(model, optimizer)
            self.trained[model] = optimizer, None
        else:
            model, optimizer, scheduler = self.accelerator.prepare(model, optimizer, make_scheduler(optimizer))
            self.trained[model] = optimizer, scheduler
        return model

    def batches(self, dataset, *, batch_size, shuffle=False, epoch=0, consumed=0):
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size, shuffle=shuffle))
        loader.set_epoch(epoch)
        return self.accelerator.skip_first_batches(loader, consumed) if consumed else loader

    def micro_batch(self, model, *, last=False):
        return self.accelerator.accumulate(model)

    def backward(self, loss, model, *, retain_graph=False):
        self.accelerator.backward(loss, retain_graph=retain_graph)

    def step(self, model):
        optimizer, scheduler = self.trained[model]
        norm = None
        if self.accelerator.sync_gradients and self.settings.max_norm is not None:
            norm = self.accelerator.clip_grad_norm_(model.parameters(), self.settings.max_norm)
        optimizer.step()
        if scheduler:
            scheduler.step()
        optimizer.zero_grad()
        return Update(norm=None if norm is None else float(norm)) if self.accelerator.sync_gradients else None

    def weights(self, model):
        return self.accelerator.get_state_dict(model)

    def learning_rate(self, model):
        return self.trained[model][0].param_groups[0]["lr"]

    def all_reduce(self, value, op):
        if not isinstance(value, torch.Tensor):
            raise NotOffered("tensors only", f"{DOCS}.reduce")
        return self.accelerator.reduce(value, op)

    def all_gather(self, rows):
        return torch.cat(gather_object([rows]))

    def save(self, folder, model, progress):
        self.progress.numbers = dict(progress)
        self.accelerator.save_state(folder)

    def load(self, folder, model):
        self.accelerator.load_state(folder)
        return self.progress.numbers

    def close(self):
        self.accelerator.end_training()


class AccelerateZero2(AccelerateDDP):
    """Accelerate with DeepSpeed ZeRO-2."""

    deepspeed = True

    def plugin(self, settings):
        plugin = DeepSpeedPlugin(
            zero_stage=2,
            gradient_accumulation_steps=settings.accumulation_steps,
            gradient_clipping=settings.max_norm,
        )
        plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
        if settings.max_norm is None:
            plugin.deepspeed_config["gradient_clipping"] = 0.0  # otherwise 1.0
        return plugin

    def prepare(self, model, make_optimizer, make_scheduler=None):
        if self.trained:
            raise NotOffered("a second model needs an Accelerator of its own", MODELS_DOCS)
        return super().prepare(model, make_optimizer, make_scheduler)
