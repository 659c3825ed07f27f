"""If rank 0 cannot write, Fabric's save raises there, and the other ranks wait for it at a barrier.

torchrun --standalone --nproc-per-node 2 fabric_failed_write.py
"""

import resource
import tempfile
from pathlib import Path

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
folder = Path(fabric.broadcast(tempfile.mkdtemp()))
model = fabric.setup(torch.nn.Linear(256, 256))
if fabric.global_rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # the model does not fit, as on a full disk
try:
    fabric.save(folder / "checkpoint", {"model": model})
    raised = False
except Exception:  # noqa: BLE001
    raised = True
    fabric.barrier()  # the other rank is in its save until rank 0 gets here
raised_on = [bool(value) for value in fabric.all_gather(torch.tensor(float(raised)))]
if fabric.global_rank == 0:
    print("expected: save raises on ranks [True, True]")
    print(f"got:      save raises on ranks {raised_on}")
torch.distributed.destroy_process_group()
