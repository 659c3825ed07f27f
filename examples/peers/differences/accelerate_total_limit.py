"""Accelerate deletes the oldest checkpoint before it writes the new one, so that total_limit=1 can leave none.

python accelerate_total_limit.py
"""

import os
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

folder = Path(tempfile.mkdtemp())
settings = ProjectConfiguration(project_dir=folder, automatic_checkpoint_naming=True, total_limit=1)
accelerator = Accelerator(cpu=True, project_config=settings)
model = accelerator.prepare(torch.nn.Linear(2, 1))
accelerator.save_state()

if (child := os.fork()) == 0:  # a process that dies when the second save begins to write
    accelerator.register_save_state_pre_hook(lambda *_: os._exit(0))
    accelerator.save_state()
os.waitpid(child, 0)

left = [path.name for path in (folder / "checkpoints").iterdir() if (path / "model.safetensors").exists()]
print("expected: complete checkpoints ['checkpoint_0']")
print(f"got:      complete checkpoints {left}")
