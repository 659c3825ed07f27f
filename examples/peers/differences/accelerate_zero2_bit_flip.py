"""DeepSpeed loads a checkpoint in which a bit has flipped.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_bit_flip.py
"""

from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs

plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = torch.nn.Linear(256, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
saved = model.module.weight.detach().clone()
accelerator.save_state("checkpoint")
if accelerator.is_main_process:
    path = next(Path("checkpoint").rglob("mp_rank_00_model_states.pt"))
    data = bytearray(path.read_bytes())
    data[data.index(saved.numpy().tobytes()) + 3] ^= 0x40  # in the exponent of the first weight
    path.write_bytes(data)
accelerator.wait_for_everyone()
accelerator.load_state("checkpoint")  # no error
if accelerator.is_main_process:
    print("expected: refused, or the weights that were saved")
    print(f"got:      loaded without an error; weights that were saved: {torch.equal(model.module.weight, saved)}")
