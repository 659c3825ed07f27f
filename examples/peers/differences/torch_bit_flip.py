"""torch.load reads a file in which a bit has flipped.

python torch_bit_flip.py
"""

import tempfile
from pathlib import Path

import torch

path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
saved = torch.nn.Linear(256, 1).state_dict()
torch.save(saved, path)

data = bytearray(path.read_bytes())
data[data.index(saved["weight"].numpy().tobytes()) + 3] ^= 0x40  # in the exponent of the first weight
path.write_bytes(data)

outcome, loaded = "loaded without an error", {}
try:
    loaded = torch.load(path)
except Exception as error:  # noqa: BLE001
    outcome = f"refused with {type(error).__name__}"
print("expected: refused, or the weights that were saved")
print(f"got:      {outcome}; weights that were saved: {torch.equal(loaded['weight'], saved['weight'])}")
