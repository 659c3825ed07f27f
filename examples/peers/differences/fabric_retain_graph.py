"""Fabric with DDP reduces only the first of two backward passes through one forward pass: ranks diverge.

torchrun --standalone --nproc-per-node 2 fabric_retain_graph.py
"""

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
model = fabric.setup(torch.nn.Linear(1, 1, bias=False))
loss = model(torch.full((1, 1), 1.0 + 2.0 * fabric.global_rank)).sum()  # the gradient is 1 on rank 0 and 3 on rank 1
fabric.backward(loss, retain_graph=True)
fabric.backward(loss)

gradients = fabric.all_gather(model.weight.grad).flatten().tolist()
if fabric.global_rank == 0:
    print("expected: gradients of the two ranks [4.0, 4.0]")
    print(f"got:      gradients of the two ranks {gradients}")
torch.distributed.destroy_process_group()
