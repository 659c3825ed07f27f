"""With ZeRO-2, ranks that use different modules of equal size add up gradients of different parameters.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_different_modules.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
plugin.deepspeed_config["gradient_clipping"] = 0.0
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


class Experts(torch.nn.ModuleList):
    def forward(self, index):
        return -(index + 1) * self[index](torch.ones(1, 1)).sum()


experts = Experts([torch.nn.Linear(1, 1, bias=False) for _ in range(2)])
torch.nn.utils.vector_to_parameters(torch.zeros(2), experts.parameters())
model, optimizer = accelerator.prepare(experts, torch.optim.SGD(experts.parameters(), lr=1.0))
accelerator.backward(model(accelerator.process_index))  # the gradient is -1 of expert 0, and -2 of expert 1
optimizer.step()
if accelerator.is_main_process:
    weights = [expert.weight.item() for expert in experts]
    print("expected: weights [0.5, 1.0], the means over the two ranks, or an error")
    print(f"got:      weights {weights}")
accelerator.end_training()
