"""A checkpoint that one rank wrote with ZeRO-2 cannot be loaded by two.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_world_size.py
"""

import os

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs


def prepared():
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
    plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model = torch.nn.Linear(2, 1)
    return accelerator, accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


if os.environ["RANK"] == "0" and os.fork() == 0:  # a run with a process group of its own
    os.environ |= {"WORLD_SIZE": "1", "MASTER_PORT": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    prepared()[0].save_state("checkpoint")
    os._exit(0)
_ = os.wait() if os.environ["RANK"] == "0" else None
try:
    prepared()[0].load_state("checkpoint")
except Exception as error:  # noqa: BLE001
    if os.environ["RANK"] == "0":
        print(f"expected: load_state raises no error\ngot:      load_state raises {type(error).__name__}")
