"""Converting a model's state dict between memory and checkpoint.

transformers holds some models differently in memory than in checkpoints: it fuses the experts of mixture-of-experts
layers, and gives parts of vision-language models other prefixes. `save_pretrained` converts back, and so must everything
else that uses checkpoint names. Tensors that convert together form a unit, such as the experts that are one tensor in
memory; most tensors are a unit each.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightrft.strategy.models import transformers_4
from lightrft.strategy.models.transformers_patches import (
    CONVERSION,
    attached_conversions,
    check,
    is_transformers_model,
    is_version_4_model,
)
from lightrft.strategy.tensors import grouped

Unit = Sequence[str]
"""Names, in memory, of tensors that convert together."""
_remembered: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""transformers' conversions of prepared models."""


@dataclass(frozen=True, kw_only=True)
class StateDictAdapter:
    """The tensors of a model that a checkpoint holds, and their conversion to it and back."""

    module: nn.Module
    """The model whose class determines the conversion."""
    names: Mapping[str, str]
    """Names in ``module``, by names in memory; these differ only if ``module`` is part of a larger model."""
    tensors: Mapping[str, torch.Tensor]
    """Parameters and persistent buffers by name in memory; tied ones once."""

    @classmethod
    def of(cls, module: nn.Module) -> "StateDictAdapter":
        """Return the adapter of a whole model."""
        tensors = saved_tensors(module)
        return cls(module=module, names={name: name for name in tensors}, tensors=tensors)

    @property
    def units(self) -> list[Unit]:
        """Names in memory, grouped into those that convert together."""
        in_memory = {saved: name for name, saved in self.names.items()}
        return [[in_memory[name] for name in unit] for unit in units(self.module, self.names.values())]

    def merges(self, unit: Unit) -> bool:
        """Return False: a model without adapters."""
        return False

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return whole units from memory, converted to the names and layout of a checkpoint."""
        return convert(self.module, {self.names[name]: tensor for name, tensor in tensors.items()})

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return whole units of a checkpoint, converted to the names and layout in memory."""
        in_memory = {saved: name for name, saved in self.names.items()}
        return {in_memory[name]: tensor for name, tensor in restore(self.module, tensors).items()}


def saved_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers of ``module`` by name; tied ones once, under the name that is saved."""
    persistent = set(module.state_dict(keep_vars=True)) - ignored_names(module)
    named = ((name, tensor) for name, tensor in all_tensors(module) if name in persistent)
    return without_ties(named, tied_aliases(module))


def without_ties(named: Iterable[tuple[str, torch.Tensor]], dropped: Collection[str]) -> dict[str, torch.Tensor]:
    """Return each tensor once, if possible under a name that is not ``dropped``."""
    kept: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named:
        if id(tensor) not in kept or kept[id(tensor)][0] in dropped:
            kept[id(tensor)] = (name, tensor)
    return dict(kept.values())


def all_tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def ignored_names(module: nn.Module) -> set[str]:
    """Return the names that transformers never saves."""
    return set(getattr(module, "_keys_to_ignore_on_save", None) or ())


def tied_aliases(module: nn.Module) -> set[str]:
    """Return the names under which transformers does not save a tied tensor, because it saves it under another."""
    if is_version_4_model(module):
        return transformers_4.tied_aliases(module, (name for name, _ in all_tensors(module)))
    return set(getattr(module, "all_tied_weights_keys", None) or ())


def units(module: nn.Module, names: Iterable[str]) -> list[Unit]:
    """Return ``names``, in order, grouped into those that convert together."""
    converters = _reversed_converters(module)
    return list(grouped((_converted_key(name, converters), name) for name in names).values())


def convert(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors``, whole units from memory, converted to the names and layout of a checkpoint."""
    if is_version_4_model(module):
        return transformers_4.convert(module, tensors)
    conversions = _conversions(module)
    if conversions is None:
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    with attached_conversions(module, conversions):
        return dict(revert_weight_conversion(module, dict(tensors)))


def saved_shapes(module: nn.Module, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Return names and shapes in a checkpoint of ``module``, from the full shapes in memory. Copies no data."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in convert(module, empty).items()}


def remember_conversions(module: nn.Module) -> None:
    """Keep the conversions of ``module``: transformers finds them by class names, which wrapping may change.

    Raises:
        StrategyError: The installed transformers lacks what the conversion uses.
    """
    if is_transformers_model(module):
        check("prepare", transformers_4.NAMING if is_version_4_model(module) else CONVERSION)
    conversions = _conversions(module)
    if conversions is not None:
        _remembered[module] = conversions


def _conversions(module: nn.Module) -> list[Any] | None:
    """Return transformers' conversions from checkpoint to memory for this model, or None if it needs none."""
    if not is_transformers_model(module) or is_version_4_model(module):
        return None
    conversions = _remembered.get(module) or getattr(module, "_weight_conversions", None)
    if conversions is None:  # not made by from_pretrained
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange

        mapping = get_model_conversion_mapping(module, add_legacy=False)
        conversions = [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)]
    return conversions or None


def _reversed_converters(module: nn.Module) -> list[Any]:
    conversions = _conversions(module)
    if conversions is None:
        return []
    from transformers.core_model_loading import WeightConverter

    reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
    return [transform for transform in reverse if isinstance(transform, WeightConverter)]


def _converted_key(name: str, converters: Sequence[Any]) -> str:
    """Return the key of the unit of ``name``: the first name that the unit converts to."""
    for converter in converters:
        converted, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return str(converted)
    return name


def restore(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors``, whole units of a checkpoint, converted to the names and layout in memory."""
    if is_version_4_model(module):
        return transformers_4.restore(module, tensors)
    conversions = _conversions(module)
    if conversions is None:
        return dict(tensors)
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        WeightTransform,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = module.state_dict(keep_vars=True)
    transforms: dict[str, WeightTransform] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, module.base_model_prefix, known)
        if name not in transforms:
            transforms[name] = WeightRenaming(key, name) if pattern is None else copy.deepcopy(by_pattern[pattern])
        transforms[name].add_tensor(name, key, key if pattern is None else pattern, tensors[key])
    restored: dict[str, torch.Tensor] = {}
    for name, transform in transforms.items():
        converted = transform.convert(name, model=module, config=module.config)
        restored.update({key: value[0] if isinstance(value, list) else value for key, value in converted.items()})
    return restored
