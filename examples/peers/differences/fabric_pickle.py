"""Fabric runs code that a sharded checkpoint's metadata holds, even with weights_only=True.

torchrun --standalone --nproc-per-node 2 fabric_pickle.py
"""

import pickle
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard


class Code:
    def __reduce__(self):
        return exec, ("import torch; torch.code_ran = True",)


strategy = ModelParallelStrategy(lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]), 2, 1)
fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
fabric.launch()
state = {"model": fabric.setup(torch.nn.Linear(2, 2))}
fabric.save("checkpoint", state)
Path("checkpoint/.metadata").write_bytes(pickle.dumps(Code()))
try:
    fabric.load("checkpoint", state, weights_only=True)
except BaseException:  # noqa: BLE001
    got = f"got:      code in the checkpoint ran: {hasattr(torch, 'code_ran')}"
    print(f"expected: code in the checkpoint ran: False\n{got}" if fabric.global_rank == 0 else "")
