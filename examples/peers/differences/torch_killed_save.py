"""A process that is killed while torch.save overwrites a checkpoint leaves neither the old one nor the new one.

python torch_killed_save.py
"""

import os
import resource
import signal
import tempfile
from pathlib import Path

import torch

path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
state = torch.nn.Linear(256, 256).state_dict()
torch.save(state, path)
if (child := os.fork()) == 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # the kernel kills the process after 100 kB of a file
    torch.save(state, path)
killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])

outcome = "no error"
try:
    torch.load(path)
except Exception as error:  # noqa: BLE001
    outcome = type(error).__name__
print("expected: save killed: True; loading raises no error")
print(f"got:      save killed: {killed}; loading raises {outcome}")
