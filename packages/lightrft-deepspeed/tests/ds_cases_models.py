"""What a rank does in `test_deepspeed_models`."""

from typing import Any

import ds_cases
import torch
import training
from llamas import Actor, llama
from programs import Observed, Program
from torch import nn


def trained(program: Program, checkpointing: str | None, **settings: Any) -> Observed:
    with ds_cases.strategy(program, persist=False, **settings) as made:
        actor: nn.Module = Actor()
        optimizer = made.create_optimizer(actor, lr=1e-3, weight_decay=0.01)
        actor, optimizer, _ = made.prepare((actor, optimizer, None))
        inner = made.unwrap_model(actor)
        if checkpointing is not None:
            inner.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            inner.enable_input_require_grads()
        training.run(program, made, actor, optimizer)
        return Observed(parameters=training.full_parameters(made, actor))


def generated(**settings: Any) -> tuple[list[int], list[int]]:
    with ds_cases.strategy(Program(), persist=False, **settings) as made:
        plain = llama()
        prompt = torch.tensor([[1, 5, 9]])
        wanted = plain.generate(prompt, max_new_tokens=5, do_sample=False)
        model, _, _ = made.prepare((plain, made.create_optimizer(plain, lr=1e-3), None))
        with torch.no_grad():
            got = model.generate(prompt, max_new_tokens=5, do_sample=False, synced_gpus=False)
        return wanted.tolist(), got.tolist()
