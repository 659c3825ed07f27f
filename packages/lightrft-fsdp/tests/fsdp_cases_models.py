"""What a rank does in `test_fsdp_models`."""

from typing import Any

import fsdp_cases
import training
from llamas import Actor
from programs import Observed, Program


def trained(program: Program, checkpointing: str | None, **settings: Any) -> Observed:
    with fsdp_cases.strategy(program, **settings) as made:
        actor, optimizer = fsdp_cases.prepared(made, Actor())
        if checkpointing is not None:
            inner = made.unwrap_model(actor)
            inner.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            inner.enable_input_require_grads()
        training.run(program, made, actor, optimizer)
        return Observed(parameters=training.full_parameters(made, actor))
