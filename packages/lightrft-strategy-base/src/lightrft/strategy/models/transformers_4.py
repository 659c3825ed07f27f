"""Models of transformers 4.57: their names in memory and in checkpoints, and loading them onto the meta device.

transformers 4 fuses no experts, so tensors are the same in memory and in checkpoints. Only the names in some
vision-language models differ: `save_pretrained` renames tensors by the reverse of the class's `_checkpoint_conversion_mapping`.
This module can go with the support of transformers 4.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightrft.strategy.models.transformers_patches import FROM_PRETRAINED, VERSIONS_4
from lightrft.strategy.patching import Patch, Target, around

_SOURCE = "https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/modeling_utils.py"


def _load_onto_meta(
    original: Callable[..., object],
    model: nn.Module,
    state_dict: object,
    shard_file: object,
    *args: object,
    **kwargs: object,
) -> object:
    """Load ``state_dict``, whose tensors are on the meta device for safetensors, instead of the file."""
    return original(model, state_dict, "", *args, **kwargs | {"device_map": {"": "meta"}})


META_LOADING = (
    FROM_PRETRAINED,
    Patch(
        target="transformers.modeling_utils:_load_state_dict_into_meta_model",
        parameters=("model", "state_dict", "shard_file", "device_map"),
        replacement=around(_load_onto_meta),
        why="Leaves every weight on the meta device, and does not read it from its file.",
        upstream=f"{_SOURCE}#L671",
        versions=VERSIONS_4,
        until="this package requires transformers 5.",
    ),
)
NAMING = (
    Target(target="transformers.modeling_utils:VLMS"),
    Target(target="transformers.modeling_utils:_get_tied_weight_keys"),
    Target(target="transformers.modeling_utils:PreTrainedModel._checkpoint_conversion_mapping"),
    Target(target="transformers.modeling_utils:PreTrainedModel._fix_state_dict_keys_on_save"),
)


def convert(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors``, by name in memory, under their names in a checkpoint."""
    return {saved_name(module, name): tensor for name, tensor in tensors.items()}


def restore(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors``, by name in a checkpoint of this class or of its base model, under their names in memory."""
    known = {saved_name(module, name): name for name in module.state_dict(keep_vars=True)}
    prefix = f"{module.base_model_prefix}."
    in_memory = {
        name: known.get(name) or known.get(prefix + name) or known.get(name.removeprefix(prefix)) for name in tensors
    }
    return {in_memory[name] or name: tensor for name, tensor in tensors.items()}


def saved_name(module: Any, name: str) -> str:
    """Return the name under which `save_pretrained` saves a tensor, as `PreTrainedModel.save_pretrained` finds it.

    See https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/modeling_utils.py#L3982
    """
    for pattern, renamed in _renamings(module):
        changed, count = re.subn(pattern, renamed, name)
        if count:
            name = changed
            break
    return str(next(iter(module._fix_state_dict_keys_on_save({name: None}))))


def tied_aliases(module: object, names: Iterable[str]) -> set[str]:
    """Return those of ``names`` that are not saved if they are tied to others: transformers 4 has patterns of them."""
    from transformers.modeling_utils import _get_tied_weight_keys

    patterns = list(_get_tied_weight_keys(module))
    return {*patterns, *(name for name in names if any(re.search(pattern, name) for pattern in patterns))}


def _renamings(module: Any) -> list[tuple[str, str]]:
    """Return patterns of names in memory, and what replaces them in a checkpoint."""
    from transformers.modeling_utils import VLMS

    classes = [each.__name__.lower() for each in type(module).__mro__[:-1]]
    if not any(known in name for name in classes for known in VLMS):
        return []
    mapping = module._checkpoint_conversion_mapping.items()
    return [(renamed, re.sub(r"\(.*\)", "", pattern.lstrip("^"))) for pattern, renamed in mapping]
