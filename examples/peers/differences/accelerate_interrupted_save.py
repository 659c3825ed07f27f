"""After a save that was interrupted, Accelerate's load_state does not find the checkpoint before it.

python accelerate_interrupted_save.py
"""

import os
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

settings = ProjectConfiguration(project_dir=tempfile.mkdtemp(), automatic_checkpoint_naming=True)
accelerator = Accelerator(cpu=True, project_config=settings)
model = accelerator.prepare(torch.nn.Linear(2, 1))
accelerator.save_state()
if (child := os.fork()) == 0:  # a process that dies when the second save begins to write
    accelerator.register_save_state_pre_hook(lambda *_: os._exit(0))
    accelerator.save_state()
os.waitpid(child, 0)

outcome = "load_state loads checkpoint_0"
try:
    accelerator.load_state()
except Exception as error:  # noqa: BLE001
    outcome = f"load_state raises {type(error).__name__}"
print("expected: load_state loads checkpoint_0")
print(f"got:      {outcome}")
