"""A save that fails on a full disk destroys the checkpoint in the same folder.

python accelerate_full_disk.py
"""

import resource
import tempfile

import torch
from accelerate import Accelerator

accelerator, folder = Accelerator(cpu=True), tempfile.mkdtemp()
model = torch.nn.Linear(256, 256)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
accelerator.backward(model(torch.ones(1, 256)).sum())
optimizer.step()
accelerator.save_state(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (264_000, -1))  # the model fits, its momentum does not, as on a full disk
outcomes = []
for action in (accelerator.save_state, accelerator.load_state):
    try:
        action(folder)
        outcomes.append("no error")
    except Exception as error:  # noqa: BLE001
        outcomes.append(type(error).__name__)
print("expected: the second save raises an error; loading the first one raises no error")
print(f"got:      the second save raises {outcomes[0]}; loading the first one raises {outcomes[1]}")
