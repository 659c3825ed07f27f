"""Accelerate with DDP reduces only the first of two backward passes through one forward pass: ranks diverge.

torchrun --standalone --nproc-per-node 2 accelerate_retain_graph.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(1, 1, bias=False))
values = torch.full((1, 1), 1.0 + 2.0 * accelerator.process_index)
loss = model(values).sum()  # the gradient is 1 on rank 0 and 3 on rank 1
accelerator.backward(loss, retain_graph=True)
accelerator.backward(loss)

gradients = gather_object([model.module.weight.grad.item()])
if accelerator.is_main_process:
    print("expected: gradients of the two ranks [4.0, 4.0]")
    print(f"got:      gradients of the two ranks {gradients}")
accelerator.end_training()
