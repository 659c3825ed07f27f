"""Fabric with DDP does not reduce the gradient of a parameter that was frozen when the model was set up: ranks diverge.

torchrun --standalone --nproc-per-node 2 fabric_unfreeze.py
"""

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
layers = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
layers[0].requires_grad_(False)
model = fabric.setup(layers)
layers[0].requires_grad_(True)
torch.nn.init.ones_(layers[1].weight)
values = torch.full((1, 1), 1.0 + 2.0 * fabric.global_rank)
fabric.backward(model(values).sum())  # the gradient is 1 on rank 0 and 3 on rank 1

gradients = fabric.all_gather(layers[0].weight.grad).flatten().tolist()
if fabric.global_rank == 0:
    print("expected: gradients of the two ranks [2.0, 2.0]")
    print(f"got:      gradients of the two ranks {gradients}")
torch.distributed.destroy_process_group()
