"""Fabric's all_reduce takes Python numbers and returns tensors.

torchrun --standalone --nproc-per-node 2 fabric_all_reduce_types.py
"""

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
reduced = fabric.all_reduce({"count": 3, "loss": 0.5}, reduce_op="sum")
types = [type(value).__name__ for value in reduced.values()]

if fabric.global_rank == 0:
    print("expected: types ['int', 'float']")
    print(f"got:      types {types}")
torch.distributed.destroy_process_group()
