"""FSDP2 replaces parameters: an optimizer that was made before fully_shard trains nothing, in silence.

torchrun --standalone --nproc-per-node 2 fsdp2_optimizer.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
before = model.weight.full_tensor()
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
changed = not torch.equal(model.weight.full_tensor(), before)

if dist.get_rank() == 0:
    print("expected: weights changed: True")
    print(f"got:      weights changed: {changed}")
dist.destroy_process_group()
