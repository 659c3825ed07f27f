"""FSDP2 trains a mixture of the weights of all ranks, if they differ.

torchrun --standalone --nproc-per-node 2 fsdp2_initial_weights.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
model = torch.nn.Linear(1, 2, bias=False)
torch.nn.init.constant_(model.weight, dist.get_rank())  # as if each rank had its own seed
fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
weights = model.weight.full_tensor().flatten().tolist()

if dist.get_rank() == 0:
    print("expected: the weights of rank 0, [0.0, 0.0], as with DDP")
    print(f"got:      weights {weights}")
dist.destroy_process_group()
