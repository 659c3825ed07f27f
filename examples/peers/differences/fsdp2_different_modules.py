"""FSDP2 mixes the weights of two modules, in silence, if ranks use different ones at the same time.

torchrun --standalone --nproc-per-node 2 fsdp2_different_modules.py
"""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (2,))
experts = [torch.nn.Linear(1, 2, bias=False) for _ in range(2)]
for index, expert in enumerate(experts):
    torch.nn.init.constant_(expert.weight, index)
    fully_shard(expert, mesh=mesh)
output = experts[dist.get_rank()](torch.ones(1, 1))  # each rank routes to another expert

outputs = [torch.zeros(1, 2) for _ in range(2)]
dist.all_gather(outputs, output.detach())
if dist.get_rank() == 0:
    print("expected: outputs of the two ranks [[0.0, 0.0], [1.0, 1.0]], or an error")
    print(f"got:      outputs of the two ranks {[output.flatten().tolist() for output in outputs]}")
dist.destroy_process_group()
