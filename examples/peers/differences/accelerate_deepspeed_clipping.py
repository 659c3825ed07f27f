"""Accelerate with DeepSpeed clips the gradient to a norm of 1 where the script did not ask for clipping.

torchrun --standalone --nproc-per-node 2 accelerate_deepspeed_clipping.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))

accelerator.backward(-model(torch.full((1, 1), 5.0)).sum())  # the gradient is -5
optimizer.step()

if accelerator.is_main_process:
    print("expected: weight 5.0")
    print(f"got:      weight {model.module.weight.item():.1f}")
accelerator.end_training()
