"""Accelerate runs code that a checkpoint holds for an object registered with register_for_checkpointing.

python accelerate_pickle.py
"""

import pickle
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator


class Code:
    def __reduce__(self):
        return exec, ("import torch; torch.code_ran = True",)


accelerator, folder = Accelerator(cpu=True), Path(tempfile.mkdtemp())
optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
accelerator.register_for_checkpointing(torch.optim.lr_scheduler.LinearLR(optimizer))
accelerator.save_state(folder)
(folder / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Code(), protocol=2))
try:
    accelerator.load_state(folder)
except Exception as error:  # noqa: BLE001
    print(f"load_state raised {type(error).__name__}")
print("expected: code in the checkpoint ran: False")
print(f"got:      code in the checkpoint ran: {hasattr(torch, 'code_ran')}")
