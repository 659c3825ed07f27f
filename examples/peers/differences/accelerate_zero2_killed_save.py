"""A process that is killed while Accelerate with ZeRO-2 overwrites a checkpoint leaves neither the old one nor the new one.

python accelerate_zero2_killed_save.py
"""

import os
import resource
import signal

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
for action, limit in (("save_state", -1), ("save_state", 200_000), ("load_state", -1)):
    if action == "save_state" and (child := os.fork()):  # each save is that of a new process
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        continue
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
    plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    accelerator.prepare(model := torch.nn.Linear(256, 256), torch.optim.SGD(model.parameters(), lr=0.1))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))  # the kernel kills a process that writes more to a file
    try:
        getattr(accelerator, action)("checkpoint")
    except Exception as error:  # noqa: BLE001
        got = f"got:      save killed: {killed}; loading raises {type(error).__name__}"
        print(f"expected: save killed: True; loading raises no error\n{got}")
    os._exit(0) if action == "save_state" else accelerator.end_training()
