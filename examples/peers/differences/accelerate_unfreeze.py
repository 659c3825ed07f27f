"""Accelerate with DDP does not reduce the gradient of a parameter that was frozen when the model was prepared: ranks diverge.

torchrun --standalone --nproc-per-node 2 accelerate_unfreeze.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

accelerator = Accelerator(cpu=True)
layers = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
layers[0].requires_grad_(False)
model = accelerator.prepare(layers)
layers[0].requires_grad_(True)
torch.nn.init.ones_(layers[1].weight)
values = torch.full((1, 1), 1.0 + 2.0 * accelerator.process_index)
accelerator.backward(model(values).sum())  # the gradient is 1 on rank 0 and 3 on rank 1

gradients = gather_object([layers[0].weight.grad.item()])
if accelerator.is_main_process:
    print("expected: gradients of the two ranks [2.0, 2.0]")
    print(f"got:      gradients of the two ranks {gradients}")
accelerator.end_training()
