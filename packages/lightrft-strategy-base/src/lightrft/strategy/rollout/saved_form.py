"""The names and the form in which a checkpoint holds a model, which may not be those in memory.

transformers keeps some models differently in memory than on disk: mixture-of-experts layers fused, the parts
of vision-language models under other prefixes. `save_pretrained` converts back; so must whatever else leaves
the process under checkpoint names. Tensors that convert together, such as the projections that are one matrix
on disk, form a unit; most tensors are units of their own.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightrft.config import UnsupportedOperationError

Unit = Sequence[str]
"""Names, in memory, of tensors that convert together."""


def saved_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers of ``module`` by name, tied ones once, under the name that is saved."""
    dropped = _tied_aliases(module)
    persistent = set(module.state_dict(keep_vars=True))
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in _all_tensors(module):
        if name in persistent and (id(tensor) not in found or found[id(tensor)][0] in dropped):
            found[id(tensor)] = (name, tensor)
    return dict(found.values())


def _all_tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tied_aliases(module: nn.Module) -> set[str]:
    """Names under which transformers does not save a tied tensor, since it saves it under another."""
    return set(getattr(module, "all_tied_weights_keys", None) or ())


def units(module: nn.Module, names: Iterable[str]) -> list[Unit]:
    """``names`` grouped into those that convert together, in order."""
    converters = _reversed_converters(module)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_converted_key(name, converters), []).append(name)
    return list(groups.values())


def convert(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``tensors``, whole units, under the names and in the form of a checkpoint."""
    if _conversions(module) is None:
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(module, dict(tensors)))


def saved_shapes(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Names and shapes that a checkpoint of ``module`` has, from the whole shapes in memory. Moves no data."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in convert(module, empty).items()}


def _conversions(module: nn.Module) -> list[Any] | None:
    """transformers' conversions from checkpoint to memory for this model, or None where there are none."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return None
    found = getattr(module, "_weight_conversions", None)
    if found is None:  # not made by from_pretrained
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        mapping = get_model_conversion_mapping(module, add_legacy=False)
        found = [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)]
    return found or None


def _reversed_converters(module: nn.Module) -> list[Any]:
    conversions = _conversions(module)
    if conversions is None:
        return []
    from transformers.core_model_loading import WeightConverter

    reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
    return [transform for transform in reverse if isinstance(transform, WeightConverter)]


def _converted_key(name: str, converters: Sequence[Any]) -> str:
    """What the tensors of one unit have in common: the first name that the unit converts to."""
    for converter in converters:
        key, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return str(key)
    return name


def restore(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The opposite of `convert`: ``tensors`` of a checkpoint, whole units, under the names in memory."""
    if _conversions(module) is None:
        return dict(tensors)
    raise UnsupportedOperationError(
        f"{type(module).__name__}: transformers keeps this model differently in memory than in checkpoints, and an "
        f"embedded engine cannot take its weights yet; use the vllm or sglang engine"
    )
