"""DDP reduces only the first of two backward passes through one forward pass: ranks diverge.

torchrun --standalone --nproc-per-node 2 ddp_retain_graph.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
loss = model(torch.full((1, 1), 1.0 + 2.0 * dist.get_rank())).sum()  # the gradient is 1 on rank 0 and 3 on rank 1
loss.backward(retain_graph=True)
loss.backward()

gradients = [torch.zeros(1, 1) for _ in range(2)]
dist.all_gather(gradients, model.module.weight.grad)
if dist.get_rank() == 0:
    print("expected: gradients of the two ranks [4.0, 4.0]")
    print(f"got:      gradients of the two ranks {[gradient.item() for gradient in gradients]}")
dist.destroy_process_group()
