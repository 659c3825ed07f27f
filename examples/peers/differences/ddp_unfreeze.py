"""DDP does not reduce the gradient of a parameter that was frozen when the model was wrapped: ranks diverge.

torchrun --standalone --nproc-per-node 2 ddp_unfreeze.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
layers[0].requires_grad_(False)
model = DistributedDataParallel(layers)
layers[0].requires_grad_(True)
torch.nn.init.ones_(layers[1].weight)
model(torch.full((1, 1), 1.0 + 2.0 * dist.get_rank())).sum().backward()  # the gradient is 1 on rank 0 and 3 on rank 1

gradients = [torch.zeros(1, 1) for _ in range(2)]
dist.all_gather(gradients, layers[0].weight.grad)
if dist.get_rank() == 0:
    print("expected: gradients of the two ranks [2.0, 2.0]")
    print(f"got:      gradients of the two ranks {[gradient.item() for gradient in gradients]}")
dist.destroy_process_group()
