"""After a failed save to the same folder, torch.distributed.checkpoint loads some old weights and some new ones.

torchrun --standalone --nproc-per-node 2 dcp_failed_save.py
"""

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard


class FullDisk(dcp.FileSystemWriter):
    def write_data(self, plan, planner):
        if dist.get_rank() == 0:
            raise OSError("No space left on device")
        return super().write_data(plan, planner)


dist.init_process_group("gloo")
model = fully_shard(torch.nn.Linear(1, 2, bias=False), mesh=dist.init_device_mesh("cpu", (2,)))
for value, writer in ((1.0, dcp.FileSystemWriter("dcp")), (2.0, FullDisk("dcp"))):
    torch.nn.init.constant_(model.weight, value)
    try:
        dcp.save(model.state_dict(), storage_writer=writer)
    except dcp.CheckpointException:
        dcp.load(model.state_dict(), checkpoint_id="dcp")
weights = model.weight.full_tensor().flatten().tolist()
if dist.get_rank() == 0:
    print(f"expected: weights [1.0, 1.0], those of the first save\ngot:      weights {weights}")
