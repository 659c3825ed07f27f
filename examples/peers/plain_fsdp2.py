"""Plain PyTorch: FSDP2 (`fully_shard`) and torch.distributed.checkpoint, as their tutorials write them.

Settings other than defaults: gloo; `set_reduce_scatter_unused_params` where a promise leaves modules unused; `DistributedSampler`.
FSDP2 shards the model as one unit.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from examples.peers.plain_ddp import CHECKPOINT_DOCS, DOCS, PlainDDP
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lightrft.conformance.peers import NotOffered

FSDP_DOCS = f"{DOCS}/distributed.fsdp.fully_shard.html"


class PlainFSDP2(PlainDDP):
    """Data, collectives and steps are those of the loop with DistributedDataParallel."""

    def wrap(self, model):
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
        model.set_reduce_scatter_unused_params(self.settings.unused_parameters)
        return model

    def micro_batch(self, model, *, last=False):
        window = self.trained[model][2]
        window.begin()
        if last and not window.complete:
            raise NotOffered("the script divides the losses", FSDP_DOCS)
        model.set_requires_gradient_sync(window.complete)
        return nullcontext()

    def weights(self, model):
        return {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}

    def save(self, folder, model, progress):
        scheduler = self.trained[model][1]
        if self.settings.random_streams:
            raise NotOffered("a checkpoint holds what the script puts into it", CHECKPOINT_DOCS)
        dcp.save(self.state(model), checkpoint_id=folder)
        script = {"progress": dict(progress), "scheduler": scheduler and scheduler.state_dict()}
        if dist.get_rank() == 0:
            torch.save(script, folder / "script.pt")
        dist.barrier()

    def load(self, folder, model):
        optimizer, scheduler, _ = self.trained[model]
        state, script = self.state(model), torch.load(folder / "script.pt")
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        if scheduler:
            scheduler.load_state_dict(script["scheduler"])
        return script["progress"]

    def state(self, model):
        model_state, optimizer_state = get_state_dict(model, self.trained[model][0])
        return {"model": model_state, "optimizer": optimizer_state}
