"""torch.save to an existing file on a full disk destroys the checkpoint before it.

python torch_full_disk.py
"""

import resource
import tempfile
from pathlib import Path

import torch

path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
state = torch.nn.Linear(256, 256).state_dict()
torch.save(state, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # a write beyond 100 kB fails, as on a full disk
outcomes = []
for action in (lambda: torch.save(state, path), lambda: torch.load(path)):
    try:
        action()
        outcomes.append("no error")
    except Exception as error:  # noqa: BLE001
        outcomes.append(type(error).__name__)
print("expected: the second save raises an error; loading the first one raises no error")
print(f"got:      the second save raises {outcomes[0]}; loading the first one raises {outcomes[1]}")
