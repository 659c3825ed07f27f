"""With FSDP2, a loss that is NaN on one rank makes the weights NaN on all ranks.

torchrun --standalone --nproc-per-node 2 fsdp2_nan.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
model = fully_shard(torch.nn.Linear(2, 1), mesh=dist.init_device_mesh("cpu", (2,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = model(torch.ones(1, 2)).sum() * (float("nan") if dist.get_rank() == 1 else 1.0)
loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
finite = bool(model.weight.full_tensor().isfinite().all())

if dist.get_rank() == 0:
    print("expected: an error, or finite weights: True")
    print(f"got:      no error; finite weights: {finite}")
dist.destroy_process_group()
