"""With DeepSpeed, too, Accelerate divides a short last window by gradient_accumulation_steps, not by the micro-batches in it.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_short_window.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=4)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
plugin.deepspeed_config["gradient_clipping"] = 0.0
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
batches = torch.utils.data.DataLoader(torch.ones(10, 1))  # on each rank, a window of 4, then one of 1
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
weights = []
for batch in batches:
    with accelerator.accumulate(model):
        accelerator.backward(-model(batch).mean())  # the gradient is -1
        optimizer.step()
        weights += [model.module.weight.item()] if accelerator.sync_gradients else []

if accelerator.is_main_process:
    print(f"expected: updates [1.0, 1.0]\ngot:      updates {[weights[0], weights[1] - weights[0]]}")
accelerator.end_training()
