"""Lightning Fabric: DDP, and FSDP2 through `ModelParallelStrategy`.

Settings other than defaults: `accelerator="cpu"`; `find_unused_parameters` (DDP) or `set_reduce_scatter_unused_params` (FSDP2) where
a promise leaves modules unused. FSDP2 shards the model as one unit.
"""

import os
from datetime import timedelta

import torch.distributed as dist
from examples.peers.shared import Window
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightrft.conformance.peers import NotOffered, Update

DOCS = "https://lightning.ai/docs/fabric/2.6.6"
ACCUMULATION_DOCS = f"{DOCS}/advanced/gradient_accumulation.html"
CHECKPOINT_DOCS = f"{DOCS}/guide/checkpoint/checkpoint.html"


class FabricDDP:
    def __init__(self, settings):
        self.settings, self.trained, self.loaders = settings, {}, {}
        timeout = {"timeout": timedelta(seconds=settings.timeout_seconds)} if settings.timeout_seconds else {}
        devices = int(os.environ["WORLD_SIZE"])
        self.fabric = Fabric(accelerator="cpu", devices=devices, strategy=self.strategy(timeout, devices))
        self.fabric.launch()

    def strategy(self, timeout, devices):
        return DDPStrategy(find_unused_parameters=self.settings.unused_parameters, **timeout)

    def prepare(self, model, make_optimizer, make_scheduler=None):
        model = self.fabric.setup_module(model)
        optimizer = make_optimizer(model.parameters())
        scheduler = make_scheduler(optimizer) if make_scheduler else None
        self.trained[model] = self.fabric.setup_optimizers(optimizer), scheduler, Window(self.settings)
        return model

    def batches(self, dataset, *, batch_size, shuffle=False, epoch=0, consumed=0):
        # Fabric counts the epochs of a loader itself
        loader, epochs = self.loaders.get(dataset) or (DataLoader(dataset, batch_size, shuffle=shuffle), 0)
        if consumed or epoch != epochs:
            raise NotOffered("the script skips the batches that it has seen", CHECKPOINT_DOCS)
        loader = loader if epochs else self.fabric.setup_dataloaders(loader)
        self.loaders[dataset] = loader, epochs + 1
        return loader

    def micro_batch(self, model, *, last=False):
        window = self.trained[model][2]
        window.begin()
        if last and not window.complete:
            raise NotOffered("the script divides the losses", ACCUMULATION_DOCS)
        return self.fabric.no_backward_sync(model, enabled=not window.complete)

    def backward(self, loss, model, *, retain_graph=False):
        self.fabric.backward(loss / self.settings.accumulation_steps, retain_graph=retain_graph)

    def step(self, model):
        optimizer, scheduler, window = self.trained[model]
        if not window.complete:
            return None
        norm = None
        if self.settings.max_norm is not None:
            norm = float(self.fabric.clip_gradients(model, optimizer, max_norm=self.settings.max_norm))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        return Update(norm=norm)

    def weights(self, model):
        state = model.state_dict()
        return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}

    def learning_rate(self, model):
        return self.trained[model][0].param_groups[0]["lr"]

    def all_reduce(self, value, op):
        return self.fabric.all_reduce(value, reduce_op=op)

    def all_gather(self, rows):
        gathered = self.fabric.all_gather(rows)
        return gathered.flatten(0, 1) if self.fabric.world_size > 1 else gathered

    def save(self, folder, model, progress):
        if self.settings.random_streams:
            raise NotOffered("a checkpoint holds what the script puts into it", CHECKPOINT_DOCS)
        self.fabric.save(folder / "checkpoint", self.state(model, progress))

    def load(self, folder, model):
        state = self.state(model, {})
        self.fabric.load(folder / "checkpoint", state)
        return state["progress"]

    def state(self, model, progress):
        optimizer, scheduler, _ = self.trained[model]
        state = {"model": model, "optimizer": optimizer, "progress": dict(progress)}
        return {**state, "scheduler": scheduler} if scheduler else state

    def close(self):
        dist.destroy_process_group()


class FabricFSDP2(FabricDDP):
    def strategy(self, timeout, devices):
        return ModelParallelStrategy(self.parallelize, data_parallel_size=devices, tensor_parallel_size=1, **timeout)

    def parallelize(self, model, mesh):
        fully_shard(model, mesh=mesh["data_parallel"])
        model.set_reduce_scatter_unused_params(self.settings.unused_parameters)
        return model
