"""What stands beside the weights in a model's directory: configuration, tokenizer, processor, custom code.

Each object knows how to write itself; this module says which, and changes none of them.
"""

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft.config import CheckpointError


def write_configuration(
    module: nn.Module, kind: type[nn.Module], dtype: torch.dtype | None, folder: Path, *, untied: bool
) -> None:
    """Write the configuration of a transformers model, as its `save_pretrained` would, and its code if it is custom.

    ``kind``: its class, which wrapping may have replaced. ``untied``: its embeddings are saved apart, whatever its
    configuration says. Other models have none. Raises `CheckpointError` where transformers refuses to write one.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not issubclass(kind, transformers.PreTrainedModel):
        return
    model: Any = module
    code: Any = kind
    config = copy.deepcopy(model.config)
    config.architectures = [kind.__name__]
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    if untied:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    if code.is_remote_code():
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(code.__new__(kind), folder, config=config)  # it looks at the class alone
    config.save_pretrained(folder)
    if code.can_generate() and model.generation_config is not None:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise CheckpointError(
                f"the generation_config of {kind.__name__} does not go into generation_config.json: {error} Correct "
                f"model.generation_config, or set it to None to save without"
            ) from error


def configuration_texts(module: nn.Module, kind: type[nn.Module]) -> dict[str, str]:
    """The configuration files of a transformers model, or of the one that holds adapters, by name; of others none.

    ``kind``: the class of ``module``, which wrapping may have replaced.
    """
    transformers, peft = sys.modules.get("transformers"), sys.modules.get("peft")
    model: Any = module.get_base_model() if peft is not None and isinstance(module, peft.PeftModel) else module
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    config = copy.deepcopy(model.config)
    config.architectures = [(kind if model is module else type(model)).__name__]
    texts = {"config.json": config.to_json_string()}
    if model.can_generate() and model.generation_config is not None:
        texts["generation_config.json"] = model.generation_config.to_json_string()
    return texts


def adapter_configurations(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The configuration of each of PEFT's adapters by name, as JSON values; of other models none."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.PeftModel):
        return {}
    return {
        name: json.loads(json.dumps(_adapter_configuration(module, name).to_dict(), default=list))
        for name in module.peft_config
    }


def write_adapter_configuration(module: nn.Module, adapter: str, folder: Path) -> None:
    """Write PEFT's configuration of one adapter, as its `save_pretrained` would."""
    _adapter_configuration(module, adapter).save_pretrained(folder)


def _adapter_configuration(model: Any, adapter: str) -> Any:
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    base = model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        kind = type(base)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config


def write_processors(processors: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizers and processors, those that are there, by the name of their argument."""
    for processor in processors.values():
        if processor is not None:
            processor.save_pretrained(folder)
