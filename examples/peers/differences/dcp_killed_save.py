"""A process that is killed while torch.distributed.checkpoint overwrites a checkpoint leaves neither the old one nor the new.

python dcp_killed_save.py
"""

import os
import resource
import signal
import tempfile

import torch
from torch.distributed import checkpoint as dcp

folder = tempfile.mkdtemp()
state = torch.nn.Linear(256, 256).state_dict()
dcp.save(state, checkpoint_id=folder, no_dist=True)
if (child := os.fork()) == 0:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # the kernel kills the process after 100 kB of a file
    dcp.save(state, checkpoint_id=folder, no_dist=True)
killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])

outcome = "no error"
try:
    dcp.load(state, checkpoint_id=folder, no_dist=True)
except dcp.CheckpointException as error:
    outcome = type(error).__name__
print("expected: save killed: True; loading raises no error")
print(f"got:      save killed: {killed}; loading raises {outcome}")
