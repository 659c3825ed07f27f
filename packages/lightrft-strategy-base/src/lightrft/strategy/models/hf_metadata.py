"""The files other than the weights in a Hugging Face directory: configuration, tokenizer, processor, custom code.

Each object writes itself; this module chooses which, and changes none of them.
"""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightrft.config import CheckpointError


def write_configuration(
    module: nn.Module, model_class: type[nn.Module], dtype: torch.dtype | None, folder: Path, *, untied: bool,
    generation_config: Any,
) -> None:  # fmt: skip
    """Write the configuration of a transformers model, as `save_pretrained` does, and its code if it is custom.

    Does nothing for other models.

    Args:
        module: The model.
        model_class: Class of the model before wrapping, which may replace it.
        dtype: The dtype to write in the configuration.
        folder: The model's directory.
        untied: The embeddings are saved separately, whatever the configuration says.
        generation_config: As `generation_config_of` returns it.

    Raises:
        CheckpointError: transformers refuses to write the generation configuration.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not issubclass(model_class, transformers.PreTrainedModel):
        return
    model: Any = module
    code: Any = model_class
    config = copy.deepcopy(model.config)
    config.architectures = [model_class.__name__]
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    if untied:
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    if code._auto_class is not None:  # its code is not in transformers
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(code.__new__(model_class), folder, config=config)  # which reads only the class
    config.save_pretrained(folder)
    if code.can_generate() and generation_config is not None:
        try:
            generation_config.save_pretrained(folder)
        except ValueError as error:
            raise CheckpointError(
                f"expected a generation_config of {model_class.__name__} that transformers can write, got an error: {error} "
                f"Correct model.generation_config, or set it to None to save without"
            ) from error


def generation_config_of(module: nn.Module) -> Any:
    """Return the configuration with which ``module`` generates, or None. One set on a PEFT model hides its base model's."""
    return getattr(module, "generation_config", None)


def adapter_configuration(module: nn.Module, adapter: str) -> Any:
    """Return PEFT's configuration of one adapter, as its `save_pretrained` writes it."""
    model: Any = module
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    base = model.get_base_model()
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config


def write_processors(processors: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizers and processors that are not None."""
    for processor in processors.values():
        if processor is not None:
            processor.save_pretrained(folder)
