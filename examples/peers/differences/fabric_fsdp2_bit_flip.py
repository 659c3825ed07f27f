"""Fabric with FSDP2 loads a checkpoint in which a bit has flipped.

torchrun --standalone --nproc-per-node 2 fabric_fsdp2_bit_flip.py
"""

from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

strategy = ModelParallelStrategy(lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]), 2, 1)
fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
fabric.launch()
model = fabric.setup(torch.nn.Linear(256, 2))
saved = model.weight.full_tensor().detach()
fabric.save("checkpoint", {"model": model})
if fabric.global_rank == 0:
    path = Path("checkpoint/__0_0.distcp")
    data = bytearray(path.read_bytes())
    data[data.index(saved[0].numpy().tobytes()) + 3] ^= 0x40  # in the exponent of the first weight
    path.write_bytes(data)
fabric.barrier()
fabric.load("checkpoint", {"model": model})  # no error
equal = torch.equal(model.weight.full_tensor(), saved)
if fabric.global_rank == 0:
    print("expected: refused, or the weights that were saved")
    print(f"got:      loaded without an error; weights that were saved: {equal}")
