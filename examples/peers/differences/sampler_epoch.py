"""DistributedSampler gives every epoch the same order, unless a script calls set_epoch.

python sampler_epoch.py
"""

import torch
from torch.utils.data import DataLoader, DistributedSampler

sampler = DistributedSampler(range(1000), num_replicas=2, rank=0, shuffle=True)
batches = DataLoader(range(1000), sampler=sampler, batch_size=500)
first, second = next(iter(batches)), next(iter(batches))

print("expected: two epochs have the same order: False")
print(f"got:      two epochs have the same order: {torch.equal(first, second)}")
