"""Accelerate on a CPU trains with DDP, in silence, where a script asked for DeepSpeed.

torchrun --standalone --nproc-per-node 2 accelerate_deepspeed_cpu.py
"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin

accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1))
model = accelerator.prepare(torch.nn.Linear(2, 1))

if accelerator.is_main_process:
    print("expected: DistributedType.DEEPSPEED, DeepSpeedEngine, or an error")
    print(f"got:      {accelerator.distributed_type}, {type(model).__name__}")
accelerator.end_training()
