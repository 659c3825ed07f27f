"""If rank 0 cannot write, torch.save raises there, and the other ranks wait for it at the barrier after the save.

torchrun --standalone --nproc-per-node 2 ddp_failed_write.py
"""

import resource

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
model = torch.nn.Linear(256, 256)  # the module that DistributedDataParallel trains
raised = False
try:
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # the model does not fit, as on a full disk
        torch.save(model.state_dict(), "checkpoint.pt")
    dist.barrier()
except Exception:  # noqa: BLE001
    raised = True
    dist.barrier()  # the other rank is at its barrier until rank 0 gets here
raised_on = [None] * 2
dist.all_gather_object(raised_on, raised)
if dist.get_rank() == 0:
    print("expected: the save raises on ranks [True, True]")
    print(f"got:      the save raises on ranks {raised_on}")
dist.destroy_process_group()
