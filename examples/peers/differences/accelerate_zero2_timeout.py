"""DeepSpeed reduces in a process group of its own, with PyTorch's timeout of 30 minutes instead of the script's.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_timeout.py
"""

from datetime import timedelta

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.distributed_c10d import _get_default_group

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
settings = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=5))
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[settings])
model = torch.nn.Linear(1, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
timeouts = [
    group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    for group in (_get_default_group(), optimizer.optimizer.dp_process_group)
]

if accelerator.is_main_process:
    print("expected: timeouts of all ranks' group and of ZeRO's group [5.0, 5.0]")
    print(f"got:      timeouts of all ranks' group and of ZeRO's group {timeouts}")
accelerator.end_training()
