"""DDP's forward replaces the buffers of a rank with those of rank 0.

torchrun --standalone --nproc-per-node 2 ddp_buffers.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.BatchNorm1d(1, momentum=1.0))  # running_mean is the mean of the last batch
batch = torch.tensor([[1.0], [3.0]]) + 10 * dist.get_rank()
model(batch)  # the mean is 2 on rank 0 and 12 on rank 1
model.eval()
model(batch)

means = [torch.zeros(1) for _ in range(2)]
dist.all_gather(means, model.module.running_mean)
if dist.get_rank() == 0:
    print("expected: running means of the two ranks [2.0, 12.0], or their mean [7.0, 7.0]")
    print(f"got:      running means of the two ranks {[mean.item() for mean in means]}")
dist.destroy_process_group()
