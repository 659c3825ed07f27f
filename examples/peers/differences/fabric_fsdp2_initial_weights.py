"""Fabric with FSDP2 trains a mixture of the weights of all ranks, if they differ.

torchrun --standalone --nproc-per-node 2 fabric_fsdp2_initial_weights.py
"""

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

strategy = ModelParallelStrategy(lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]), 2, 1)
fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
fabric.launch()
model = torch.nn.Linear(1, 2, bias=False)
torch.nn.init.constant_(model.weight, fabric.global_rank)  # as if each rank had its own seed
weights = fabric.setup(model).weight.full_tensor().flatten().tolist()

if fabric.global_rank == 0:
    print("expected: the weights of rank 0, [0.0, 0.0], as with DDP")
    print(f"got:      weights {weights}")
torch.distributed.destroy_process_group()
