"""DeepSpeed runs code that its files hold, which Accelerate's load_state loads.

torchrun --standalone --nproc-per-node 2 accelerate_zero2_pickle.py
"""

from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs


class Code:
    def __reduce__(self):
        return exec, ("import torch; torch.code_ran = True",)


plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1)
plugin.deepspeed_config |= {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = torch.nn.Linear(2, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
accelerator.save_state("checkpoint")
torch.save(Code(), next(Path("checkpoint").rglob(f"zero_pp_rank_{accelerator.process_index}_*_optim_states.pt")))
accelerator.wait_for_everyone()
try:
    accelerator.load_state("checkpoint")
except Exception:  # noqa: BLE001
    got = f"got:      code in the checkpoint ran: {hasattr(torch, 'code_ran')}"
    print(f"expected: code in the checkpoint ran: False\n{got}" if accelerator.is_main_process else "")
