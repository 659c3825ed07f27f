"""Accelerate steps the scheduler once for each rank.

torchrun --standalone --nproc-per-node 2 accelerate_scheduler.py
"""

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

accelerator.backward(model(torch.ones(1, 2)).sum())
optimizer.step()
scheduler.step()  # halves the learning rate

if accelerator.is_main_process:
    print("expected: learning rate 0.05 after 1 update")
    print(f"got:      learning rate {scheduler.get_last_lr()[0]} after 1 update")
accelerator.end_training()
