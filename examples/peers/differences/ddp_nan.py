"""A loss that is NaN on one rank makes the weights NaN on all ranks.

torchrun --standalone --nproc-per-node 2 ddp_nan.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = model(torch.ones(1, 2)).sum() * (float("nan") if dist.get_rank() == 1 else 1.0)
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()

if dist.get_rank() == 0:
    print("expected: an error, or finite weights: True")
    print(f"got:      no error; finite weights: {bool(model.module.weight.isfinite().all())}")
dist.destroy_process_group()
