"""A process that is killed while Accelerate overwrites a checkpoint leaves neither the old one nor the new one.

python accelerate_killed_save.py
"""

import os
import resource
import signal
import tempfile

import torch
from accelerate import Accelerator

folder, accelerator = tempfile.mkdtemp(), Accelerator(cpu=True)
model = torch.nn.Linear(256, 256)
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
accelerator.backward(model(torch.ones(1, 256)).sum())
optimizer.step()
accelerator.save_state(folder)
if (child := os.fork()) == 0:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, -1))  # the kernel kills the process after 400 kB of a file
    accelerator.save_state(folder)
killed, outcome = os.WIFSIGNALED(os.waitpid(child, 0)[1]), "no error"
try:
    accelerator.load_state(folder)
except Exception as error:  # noqa: BLE001
    outcome = type(error).__name__
print("expected: save killed: True; loading raises no error")
print(f"got:      save killed: {killed}; loading raises {outcome}")
