"""Accelerate loads a checkpoint in which a bit has flipped.

python accelerate_bit_flip.py
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(2, 1))
saved = model.weight.detach().clone()
folder = Path(tempfile.mkdtemp())
accelerator.save_state(folder)

data = bytearray((folder / "model.safetensors").read_bytes())
data[-1] ^= 0x40  # in the exponent of the last number
(folder / "model.safetensors").write_bytes(data)

outcome = "loaded without an error"
try:
    accelerator.load_state(folder)
except Exception as error:  # noqa: BLE001
    outcome = f"refused with {type(error).__name__}"
print("expected: refused, or the weights that were saved")
print(f"got:      {outcome}; weights that were saved: {torch.equal(model.weight, saved)}")
