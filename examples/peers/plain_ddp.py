"""Plain PyTorch: DistributedDataParallel, in a loop as its documentation writes it.

Settings other than defaults: gloo; `find_unused_parameters` where a promise leaves modules unused; `DistributedSampler`.
"""

from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from examples.peers.shared import Window, sampled
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightrft.conformance.peers import NotOffered, Update

DOCS = "https://docs.pytorch.org/docs/2.13"
DDP_DOCS = f"{DOCS}/generated/torch.nn.parallel.DistributedDataParallel.html"
CHECKPOINT_DOCS = "https://docs.pytorch.org/tutorials/recipes/recipes/saving_and_loading_a_general_checkpoint.html"
DATA_DOCS = f"{DOCS}/data.html#torch.utils.data.distributed.DistributedSampler"
REDUCE_DOCS = f"{DOCS}/distributed.html#torch.distributed.all_reduce"


class PlainDDP:
    def __init__(self, settings):
        timeout = {"timeout": timedelta(seconds=settings.timeout_seconds)} if settings.timeout_seconds else {}
        dist.init_process_group("gloo", **timeout)
        self.settings, self.trained = settings, {}

    def prepare(self, model, make_optimizer, make_scheduler=None):
        model = self.wrap(model)
        optimizer = make_optimizer(model.parameters())
        scheduler = make_scheduler(optimizer) if make_scheduler else None
        self.trained[model] = optimizer, scheduler, Window(self.settings)
        return model

    def wrap(self, model):
        return DistributedDataParallel(model, find_unused_parameters=self.settings.unused_parameters)

    def batches(self, dataset, *, batch_size, shuffle=False, epoch=0, consumed=0):
        if consumed:
            raise NotOffered("the script skips the batches that it has seen", DATA_DOCS)
        return sampled(dataset, batch_size, shuffle, epoch)

    def micro_batch(self, model, *, last=False):
        window = self.trained[model][2]
        window.begin()
        if last and not window.complete:
            raise NotOffered("the script divides the losses", DDP_DOCS)
        return nullcontext() if window.complete else model.no_sync()

    def backward(self, loss, model, *, retain_graph=False):
        (loss / self.settings.accumulation_steps).backward(retain_graph=retain_graph)

    def step(self, model):
        optimizer, scheduler, window = self.trained[model]
        if not window.complete:
            return None
        norm = None
        if self.settings.max_norm is not None:
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), self.settings.max_norm))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        return Update(norm=norm)

    def weights(self, model):
        return model.module.state_dict()

    def learning_rate(self, model):
        return self.trained[model][0].param_groups[0]["lr"]

    def all_reduce(self, value, op):
        if not isinstance(value, torch.Tensor):
            raise NotOffered("tensors only", REDUCE_DOCS)
        dist.all_reduce(value, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return value / dist.get_world_size() if op == "mean" else value  # gloo has no AVG

    def all_gather(self, rows):
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, rows)
        return torch.cat(gathered)

    def save(self, folder, model, progress):
        optimizer, scheduler, _ = self.trained[model]
        if self.settings.random_streams:
            raise NotOffered("a checkpoint holds what the script puts into it", CHECKPOINT_DOCS)
        folder.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": dict(progress)}
        state["scheduler"] = scheduler and scheduler.state_dict()
        if dist.get_rank() == 0:
            torch.save(state, folder / "checkpoint.pt")
        dist.barrier()

    def load(self, folder, model):
        optimizer, scheduler, _ = self.trained[model]
        state = torch.load(folder / "checkpoint.pt", map_location="cpu")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if scheduler:
            scheduler.load_state_dict(state["scheduler"])
        return state["progress"]

    def close(self):
        dist.destroy_process_group()
