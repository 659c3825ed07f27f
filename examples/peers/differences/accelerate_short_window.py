"""Accelerate divides a short last window by gradient_accumulation_steps, not by the micro-batches that it holds.

python accelerate_short_window.py
"""

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
batches = torch.utils.data.DataLoader(torch.ones(5, 1))  # a window of 4, then one of 1
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

updates, before = [], 0.0
for batch in batches:
    with accelerator.accumulate(model):
        accelerator.backward(-model(batch).mean())  # the gradient is -1
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.sync_gradients:
            updates.append(model.weight.item() - before)
            before = model.weight.item()

print("expected: updates [1.0, 1.0]")
print(f"got:      updates {updates}")
