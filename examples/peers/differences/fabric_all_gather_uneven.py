"""Fabric's all_gather of tensors with different numbers of rows ends the process, with gloo.

torchrun --standalone --nproc-per-node 2 fabric_all_gather_uneven.py
"""

import os

import torch
from lightning_fabric import Fabric

child = os.fork()  # what ends the process ends only this one
if child == 0:
    try:
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        fabric.all_gather(torch.ones(1 + fabric.global_rank, 2))
    except Exception:  # noqa: BLE001
        os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)

if os.environ["RANK"] == "0":
    print("expected: process of rank 0 ends with exit code 0, or with 1 after an error")
    print(f"got:      process of rank 0 ends with exit code {os.waitstatus_to_exitcode(status)}")
