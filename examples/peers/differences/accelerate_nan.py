"""With Accelerate and DDP, a loss that is NaN on one rank makes the weights NaN on all ranks.

torchrun --standalone --nproc-per-node 2 accelerate_nan.py
"""

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
loss = model(torch.ones(1, 2)).sum() * (float("nan") if accelerator.process_index == 1 else 1.0)
accelerator.backward(loss)
accelerator.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()

if accelerator.is_main_process:
    print("expected: an error, or finite weights: True")
    print(f"got:      no error; finite weights: {bool(model.module.weight.isfinite().all())}")
accelerator.end_training()
