"""Accelerate with DeepSpeed steps the scheduler once for each rank.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_scheduler.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
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
