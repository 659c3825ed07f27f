"""Fabric's all_reduce rounds the mean of integers down.

torchrun --standalone --nproc-per-node 2 fabric_all_reduce_integers.py
"""

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
correct = 1 if fabric.global_rank == 0 else 2
mean = fabric.all_reduce({"correct": correct})["correct"]

if fabric.global_rank == 0:
    print("expected: the mean of 1 and 2 is 1.5")
    print(f"got:      the mean of 1 and 2 is {mean.item()}")
torch.distributed.destroy_process_group()
