"""The names and the form in which a checkpoint holds a model, which may not be those in memory.

transformers keeps some models differently in memory than on disk: mixture-of-experts layers fused, the parts
of vision-language models under other prefixes. `save_pretrained` converts back; so must whatever else leaves
the process under checkpoint names. Tensors that convert together, such as the projections that are one matrix
on disk, form a unit; most tensors are units of their own.
"""

import copy
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Unit = Sequence[str]
"""Names, in memory, of tensors that convert together."""


@dataclass(frozen=True, kw_only=True)
class SavedForm:
    """What a checkpoint of a model holds, and how that comes out of memory and back into it."""

    module: nn.Module
    """The model whose class knows the names and the form."""
    names: Mapping[str, str]
    """Its names, by the names in memory: the same, but where the model is part of something larger."""
    tensors: Mapping[str, torch.Tensor]
    """Parameters and persistent buffers by name in memory, tied ones once."""

    @classmethod
    def of(cls, module: nn.Module) -> "SavedForm":
        """The form of a whole model."""
        tensors = saved_tensors(module)
        return cls(module=module, names={name: name for name in tensors}, tensors=tensors)

    @property
    def units(self) -> list[Unit]:
        """Names in memory, those together that convert together."""
        in_memory = {name: key for key, name in self.names.items()}
        return [[in_memory[name] for name in unit] for unit in units(self.module, self.names.values())]

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole units from memory, under the names and in the form of a checkpoint."""
        return convert(self.module, {self.names[key]: tensor for key, tensor in tensors.items()})

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole units of a checkpoint, under the names and in the form that they have in memory."""
        in_memory = {name: key for key, name in self.names.items()}
        return {in_memory[name]: tensor for name, tensor in restore(self.module, tensors).items()}


def saved_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and persistent buffers of ``module`` by name, tied ones once, under the name that is saved."""
    persistent = set(module.state_dict(keep_vars=True)) - ignored_names(module)
    named = ((name, tensor) for name, tensor in all_tensors(module) if name in persistent)
    return without_ties(named, tied_aliases(module))


def without_ties(named: Iterable[tuple[str, torch.Tensor]], dropped: Collection[str]) -> dict[str, torch.Tensor]:
    """Each tensor once, where it can be under a name that is not ``dropped``."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named:
        if id(tensor) not in found or found[id(tensor)][0] in dropped:
            found[id(tensor)] = (name, tensor)
    return dict(found.values())


def all_tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters and buffers by all their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def ignored_names(module: nn.Module) -> set[str]:
    """Names that transformers never saves."""
    return set(getattr(module, "_keys_to_ignore_on_save", None) or ())


def tied_aliases(module: nn.Module) -> set[str]:
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


def remember(module: nn.Module) -> None:
    """Keep the conversions with ``module``, as from_pretrained does: transformers finds them by the names of classes,
    which wrapping may change.
    """
    found = _conversions(module)
    if found is not None:
        module._weight_conversions = found  # type: ignore[assignment]


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
    """The opposite of `convert`: ``tensors`` of a checkpoint, whole units, under the names and in the form in memory."""
    conversions = _conversions(module)
    if conversions is None:
        return dict(tensors)
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [it for it in conversions if isinstance(it, WeightRenaming)]
    converters = [it for it in conversions if isinstance(it, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = module.state_dict(keep_vars=True)
    steps: dict[str, Any] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, module.base_model_prefix, known)
        if name not in steps:
            steps[name] = WeightRenaming(key, name) if pattern is None else copy.deepcopy(by_pattern[pattern])
        steps[name].add_tensor(name, key, key if pattern is None else pattern, tensors[key])
    restored: dict[str, torch.Tensor] = {}
    for name, step in steps.items():
        made = step.convert(name, model=module, config=module.config)
        restored.update({key: it[0] if isinstance(it, list) else it for key, it in made.items()})
    return restored
