"""Fabric loads a checkpoint in which a bit has flipped.

python fabric_bit_flip.py
"""

import tempfile
from pathlib import Path

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=1)
model = fabric.setup(torch.nn.Linear(256, 1))
saved = model.weight.detach().clone()
path = Path(tempfile.mkdtemp()) / "checkpoint"
fabric.save(path, {"model": model})

data = bytearray(path.read_bytes())
data[data.index(saved.numpy().tobytes()) + 3] ^= 0x40  # in the exponent of the first weight
path.write_bytes(data)

outcome = "loaded without an error"
try:
    fabric.load(path, {"model": model})
except Exception as error:  # noqa: BLE001
    outcome = f"refused with {type(error).__name__}"
print("expected: refused, or the weights that were saved")
print(f"got:      {outcome}; weights that were saved: {torch.equal(model.weight, saved)}")
