"""Fabric's all_reduce turns Python integers into 32-bit tensors.

torchrun --standalone --nproc-per-node 2 fabric_all_reduce_large_integers.py
"""

import torch
from lightning_fabric import Fabric

fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
results = []
for tokens in (2**30, 2**40):
    try:
        results.append(int(fabric.all_reduce({"tokens": tokens}, reduce_op="sum")["tokens"]))
    except RuntimeError as error:
        results.append(f"RuntimeError: {error}")

if fabric.global_rank == 0:
    print(f"expected: {[2**31, 2**41]}")
    print(f"got:      {results}")
torch.distributed.destroy_process_group()
