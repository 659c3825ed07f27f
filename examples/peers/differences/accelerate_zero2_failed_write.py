"""If the write of one rank fails with ZeRO-2, save_state raises on that rank, and the other one waits for it.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_failed_write.py
"""

import resource
import threading
import time

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = torch.nn.Linear(256, 256)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
if accelerator.process_index == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # its optimizer state does not fit, as on a full disk
    try:
        accelerator.save_state("checkpoint")
    except Exception:  # noqa: BLE001
        time.sleep(25)
else:
    save = threading.Thread(target=accelerator.save_state, args=["checkpoint"], daemon=True)
    save.start()
    save.join(15)
    print("expected: save_state of rank 0 waits for rank 1 after 15 s: False")
    print(f"got:      save_state of rank 0 waits for rank 1 after 15 s: {save.is_alive()}")
