"""A process that is killed while Fabric with FSDP2 overwrites a checkpoint leaves neither the old one nor the new one.

python fabric_fsdp2_killed_save.py
"""

import os
import resource
import signal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

for action, limit in (("save", -1), ("save", 100_000), ("load", -1)):
    if action == "save" and (child := os.fork()):  # each save is that of a new process
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        continue
    strategy = ModelParallelStrategy(lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]), 1, 1)
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))  # the kernel kills a process that writes more to a file
    try:
        getattr(fabric, action)("checkpoint", {"model": fabric.setup(torch.nn.Linear(256, 256))})
    except BaseException as error:  # noqa: BLE001
        got = f"got:      save killed: {killed}; loading raises {type(error).__name__}"
        print(f"expected: save killed: True; loading raises no error\n{got}")
    os._exit(0) if action == "save" else torch.distributed.destroy_process_group()
