"""Accelerate counts the micro-batches of all models together.

python accelerate_two_models.py
"""

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
models = [torch.nn.Linear(2, 1) for _ in range(2)]
optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
models, optimizers = accelerator.prepare(*models), accelerator.prepare(*optimizers)

updates = [0, 0]
for _ in range(4):  # the two models in turn, as actor and critic
    for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        before = model.weight.detach().clone()
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()
        updates[index] += not torch.equal(model.weight, before)

print("expected: updates [2, 2]")
print(f"got:      updates {updates}")
