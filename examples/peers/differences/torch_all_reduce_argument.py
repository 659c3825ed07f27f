"""torch.distributed.all_reduce changes its argument.

torchrun --standalone --nproc-per-node 2 torch_all_reduce_argument.py
"""

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
loss = torch.tensor(float(dist.get_rank()))
dist.all_reduce(loss)
changed = loss.item() != dist.get_rank()

if dist.get_rank() == 0:
    print("expected: argument changed: False")
    print(f"got:      argument changed: {changed}")
dist.destroy_process_group()
