"""DeepSpeed leaves out a parameter that was frozen when it was prepared: unfrozen later, it has a gradient and is not trained.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_unfreeze.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
layers = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
for layer in layers:
    torch.nn.init.ones_(layer.weight)
layers[0].requires_grad_(False)
model, optimizer = accelerator.prepare(layers, torch.optim.SGD(layers.parameters(), lr=0.1))
layers[0].requires_grad_(True)
accelerator.backward(model(torch.ones(1, 1)).sum())
optimizer.step()

if accelerator.is_main_process:
    changed = [layer.weight.item() != 1.0 for layer in layers]
    print("expected: changed by the update: [True, True]")
    print(f"got:      changed by the update: {changed}")
accelerator.end_training()
