"""Accelerate repeats samples until each rank has full batches.

torchrun --standalone --nproc-per-node 2 accelerate_padding.py
"""

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
batches = accelerator.prepare(torch.utils.data.DataLoader(torch.arange(5), batch_size=2))
seen = sorted(torch.cat([accelerator.gather(batch) for batch in batches]).tolist())

if accelerator.is_main_process:
    print("expected: of 5 samples, 1 is seen twice, so that both ranks have 3")
    print(f"got:      of 5 samples, {len(seen) - 5} are seen twice: {seen}")
accelerator.end_training()
