"""Fabric's all_gather adds a dimension for the ranks, but not on one rank.

python fabric_all_gather.py
"""

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=1)
fabric.launch()
shape = tuple(fabric.all_gather(torch.ones(3)).shape)

print("expected: shape (1, 3), as (2, 3) on two ranks")
print(f"got:      shape {shape}")
