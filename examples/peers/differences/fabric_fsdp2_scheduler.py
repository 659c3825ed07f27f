"""Fabric's load restores a scheduler with DDP, but not with FSDP2.

torchrun --standalone --nproc-per-node 2 fabric_fsdp2_scheduler.py
"""

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

steps = []
for strategy in (
    "ddp",
    ModelParallelStrategy(lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]), 2, 1),
):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scheduler.step()
    fabric.save(f"checkpoint-{len(steps)}", {"model": model, "scheduler": scheduler})
    scheduler.step()
    fabric.load(f"checkpoint-{len(steps)}", {"model": model, "scheduler": scheduler})
    steps.append(scheduler.last_epoch)
if fabric.global_rank == 0:
    print("expected: step of the scheduler with DDP 1, with FSDP2 1")
    print(f"got:      step of the scheduler with DDP {steps[0]}, with FSDP2 {steps[1]}")
torch.distributed.destroy_process_group()
