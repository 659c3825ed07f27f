"""What a rank does to write and read the checkpoints of other versions."""

from typing import Any

import exports
import torch.distributed.checkpoint as dcp
import training
from llamas import llama
from torch.distributed.checkpoint.state_dict import get_model_state_dict


def wrote_dcp(path: str, **settings: Any) -> Any:
    """Save a model in training as LightRFT's FSDP strategy did; its weights."""
    with exports.opened("fsdp", **settings) as made:
        model, _ = exports.in_training(made, llama(), updates=1)
        dcp.save(get_model_state_dict(made.unwrap_model(model)), checkpoint_id=path)
        return training.full_parameters(made, model)


def wrote_deepspeed(path: str, **settings: Any) -> Any:
    """Save a model in training as LightRFT's DeepSpeed strategy did; its weights."""
    with exports.opened("deepspeed", **settings) as made:
        model, _ = exports.in_training(made, llama(), updates=1)
        for part in model.modules():  # ours refuse empty parameters, with which DeepSpeed's own checkpoint begins
            part._state_dict_pre_hooks.clear()
        engine: Any = made.backend.engines[made.unwrap_model(model)]  # type: ignore[attr-defined]
        engine.save_checkpoint(path, tag="step1", client_state={"consumed": 3})
        return training.full_parameters(made, model)
