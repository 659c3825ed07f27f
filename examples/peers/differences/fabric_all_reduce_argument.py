"""Fabric's all_reduce changes its argument.

torchrun --standalone --nproc-per-node 2 fabric_all_reduce_argument.py
"""

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
metrics = {"loss": torch.tensor([float(fabric.global_rank)])}
fabric.all_reduce(metrics, reduce_op="sum")
changed = metrics["loss"].item() != fabric.global_rank

if fabric.global_rank == 0:
    print("expected: argument changed: False")
    print(f"got:      argument changed: {changed}")
torch.distributed.destroy_process_group()
