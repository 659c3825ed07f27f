"""If the write of one rank fails, the other ranks do not hear of it: save_state raises on that rank alone.

torchrun --standalone --nproc-per-node 2 accelerate_failed_write.py
"""

import resource
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

accelerator = Accelerator(cpu=True)
folder = broadcast_object_list([tempfile.mkdtemp()])[0]
model = torch.nn.Linear(256, 256)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
if accelerator.is_main_process:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # the model does not fit, as on a full disk
try:
    accelerator.save_state(folder)
    raised = False
except Exception:  # noqa: BLE001
    raised = True
raised_on = gather_object([raised])
if accelerator.is_main_process:
    print("expected: save_state raises on ranks [True, True]")
    print(f"got:      save_state raises on ranks {raised_on}")
accelerator.end_training()
