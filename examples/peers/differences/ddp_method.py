"""DDP reduces nothing if a script calls another method than forward: ranks diverge.

torchrun --standalone --nproc-per-node 2 ddp_method.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Model(torch.nn.Linear):
    def log_probs(self, values):
        return self(values).log_softmax(-1)


dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(Model(1, 2, bias=False))
values = torch.full((1, 1), 1.0 + 2.0 * dist.get_rank())
model.module.log_probs(values)[0, 0].backward()

gradients = [torch.zeros(2, 1) for _ in range(2)]
dist.all_gather(gradients, model.module.weight.grad)
if dist.get_rank() == 0:
    print("expected: the two ranks have the same gradient: True")
    print(f"got:      the two ranks have the same gradient: {torch.equal(*gradients)}")
dist.destroy_process_group()
