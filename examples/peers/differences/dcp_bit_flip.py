"""torch.distributed.checkpoint loads a checkpoint in which a bit has flipped.

python dcp_bit_flip.py
"""

import tempfile
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

folder = Path(tempfile.mkdtemp())
saved = torch.nn.Linear(256, 1).state_dict()
dcp.save(saved, checkpoint_id=folder, no_dist=True)

path = folder / "__0_0.distcp"
data = bytearray(path.read_bytes())
data[data.index(saved["weight"].numpy().tobytes()) + 3] ^= 0x40  # in the exponent of the first weight
path.write_bytes(data)

outcome, loaded = "loaded without an error", torch.nn.Linear(256, 1).state_dict()
try:
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
except Exception as error:  # noqa: BLE001
    outcome = f"refused with {type(error).__name__}"
print("expected: refused, or the weights that were saved")
print(f"got:      {outcome}; weights that were saved: {torch.equal(loaded['weight'], saved['weight'])}")
