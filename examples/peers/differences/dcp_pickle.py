"""torch.distributed.checkpoint runs code that a checkpoint's metadata holds.

python dcp_pickle.py
"""

import pickle
import tempfile
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp


class Code:
    def __reduce__(self):
        return exec, ("import torch; torch.code_ran = True",)


folder = Path(tempfile.mkdtemp())
state = torch.nn.Linear(2, 1).state_dict()
dcp.save(state, checkpoint_id=folder, no_dist=True)
(folder / ".metadata").write_bytes(pickle.dumps(Code()))
try:
    dcp.load(state, checkpoint_id=folder, no_dist=True)
except dcp.CheckpointException:
    print("dcp.load raised CheckpointException")
print("expected: code in the checkpoint ran: False")
print(f"got:      code in the checkpoint ran: {hasattr(torch, 'code_ran')}")
