"""Accelerate with DeepSpeed steps the optimizer in backward, so that two backward passes make two updates.

torchrun --standalone --nproc-per-node 2 accelerate_deepspeed_backward.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
plugin.deepspeed_config["gradient_clipping"] = 0.0
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))

accelerator.backward(-model(torch.ones(1, 1)).sum())  # the gradient is -1
before = model.module.weight.item()
optimizer.step()

if accelerator.is_main_process:
    print("expected: weight 0.0 before optimizer.step(), 1.0 after it")
    print(f"got:      weight {before} before optimizer.step(), {model.module.weight.item()} after it")
accelerator.end_training()
