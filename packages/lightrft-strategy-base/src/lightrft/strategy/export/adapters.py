"""Models with PEFT adapters: their adapters alone, their base model, and the base model with the adapters merged in.

Such a model has both in memory, under names of its own: a prefix before the base model's names, and ``base_layer``
or ``original_module`` where an adapter wraps a layer. Its skeleton, the copy on the meta device that was made before
wrapping, knows the names; and it merges, a copy of one layer at a time, so that the model itself is never touched.
"""

import copy
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lightrft.config import UnsupportedOperationError
from lightrft.strategy.export.forms import NamedForm
from lightrft.strategy.rollout import saved_form
from lightrft.strategy.rollout.saved_form import SavedForm, Unit


def has_adapters(module: nn.Module) -> bool:
    """Whether ``module`` is PEFT's model around a base model."""
    if getattr(module, "_hf_peft_config_loaded", False):
        raise UnsupportedOperationError(
            f"{type(module).__name__} holds adapters that were added with transformers' add_adapter; add them with "
            f"peft.get_peft_model, which keeps the base model apart"
        )
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


# Adapters alone


def adapter_form(module: nn.Module, skeleton: nn.Module, adapter: str) -> NamedForm:
    """One adapter, under the names that PEFT's own files have."""
    names, own = _adapter_names(skeleton, adapter), dict(saved_form.all_tensors(module))
    return NamedForm(tensors={name: own[name] for name in names}, names=names)


def _adapter_names(skeleton: nn.Module, adapter: str) -> dict[str, str]:
    from peft import get_peft_model_state_dict

    own = skeleton.state_dict(keep_vars=True)
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    # Left to itself, PEFT looks for the base model's configuration, on the network too.
    embeddings = _trains_embeddings(skeleton)
    found = get_peft_model_state_dict(
        skeleton, state_dict=state, adapter_name=adapter, save_embedding_layers=embeddings
    )
    in_memory = {id(tensor): name for name, tensor in state.items()}
    return {in_memory[id(tensor)]: name for name, tensor in found.items()}


def _trains_embeddings(model: Any) -> bool:
    """Whether embeddings train, by themselves or through adapters; those that PEFT copied to train have names anyway."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not hasattr(model, "get_input_embeddings"):
        return False
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    own = [it for it in layers if it is not None and not isinstance(it, AuxiliaryTrainingWrapper)]
    return any(parameter.requires_grad for layer in own for parameter in layer.parameters())


# The base model


def base_form(module: nn.Module, skeleton: nn.Module) -> SavedForm:
    """The base model of ``module``, as a checkpoint that knows no adapters has it."""
    base = _base_model(skeleton)
    return _form(module, base, _base_names(skeleton, base, merged=False), changed=())


def _base_model(skeleton: Any) -> nn.Module:
    base: nn.Module = skeleton.get_base_model()
    return base


def _form(module: nn.Module, base: nn.Module, names: Mapping[str, str], changed: Collection[str]) -> SavedForm:
    """Those tensors of ``module`` that have names in ``base``; tied ones once, but for those that will be ``changed``."""
    persistent = module.state_dict(keep_vars=True).keys() & names.keys()
    tensors = {name: tensor for name, tensor in saved_form.all_tensors(module) if name in persistent}
    tied = ((names[name], tensor) for name, tensor in tensors.items() if name not in changed)
    kept = saved_form.without_ties(tied, saved_form.tied_aliases(base)).keys() | {names[name] for name in changed}
    chosen = {name: names[name] for name in tensors if names[name] in kept - saved_form.ignored_names(base)}
    return SavedForm(module=base, names=chosen, tensors={name: tensors[name] for name in chosen})


def _base_names(skeleton: nn.Module, base: nn.Module, *, merged: bool) -> dict[str, str]:
    """Names in the base model, by names in memory; what belongs to adapters has none.

    ``merged``: modules that were trained whole beside the adapters take the place of the original ones.
    """
    prefix = next(f"{path}." for path, part in skeleton.named_modules() if part is base)
    inside = {path: within for path, part in skeleton.named_modules() if (within := _wrapped(part, merged)) is not None}
    found = {name: _without_wrappers(name, inside) for name, _ in saved_form.all_tensors(skeleton)}
    return {name: it.removeprefix(prefix) for name, it in found.items() if it is not None and it.startswith(prefix)}


def _wrapped(part: nn.Module, merged: bool) -> str | None:
    """Where in ``part`` the base model's own is, if ``part`` is one of PEFT's wrappers."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(part, BaseTunerLayer):
        return "base_layer."
    if not isinstance(part, AuxiliaryTrainingWrapper):
        return None
    if not merged or not part.active_adapters:
        return "original_module."
    if not isinstance(part, ModulesToSaveWrapper):
        raise _cannot_merge(f"a {type(part).__name__}")
    return f"modules_to_save.{part.active_adapters[0]}."


def _without_wrappers(name: str, inside: Mapping[str, str]) -> str | None:
    """``name`` as it was before wrapping, or None where it is a wrapper's own."""
    cuts = []
    for end in (index for index, letter in enumerate(name) if letter == "."):
        within = inside.get(name[:end])
        if within is not None:
            if not name.startswith(within, end + 1):
                return None
            cuts.append((end + 1, end + 1 + len(within)))
    for begin, end in reversed(cuts):
        name = name[:begin] + name[end:]
    return name


# The base model with the adapters merged in


class MergedForm:
    """A whole model with its active adapters merged in, as a checkpoint of the base model's class has it."""

    def __init__(self, module: nn.Module, skeleton: nn.Module) -> None:
        _check_same_adapters(module, skeleton)
        self._skeleton, base = skeleton, _base_model(skeleton)
        own = dict(saved_form.all_tensors(module))
        self._adapters = _adapters(skeleton)
        """Names of the adapters' tensors, by that of the weight into which they are merged."""
        self._base = _form(module, base, _base_names(skeleton, base, merged=True), changed=self._adapters.keys())
        self.tensors = {name: own[name] for unit in self.units for name in unit}

    @property
    def units(self) -> list[Unit]:
        """Those of the base model, each weight with its adapters."""
        return [[*unit, *(it for name in unit for it in self._adapters.get(name, ()))] for unit in self._base.units]

    def merges(self, unit: Unit) -> bool:
        """Whether adapters are merged in ``unit``, which takes full precision."""
        return any(name in self._adapters for name in unit)

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole units from memory, merged, as a checkpoint of the base model has them."""
        merged = {name: tensor for name, tensor in tensors.items() if name in self._base.names}
        for name in merged.keys() & self._adapters.keys():
            if not merged[name].is_meta:
                merged[name] = self._merge(name, tensors)
        return self._base.convert(merged)

    def _merge(self, weight: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """PEFT's own merging, on a copy of one layer that holds copies of ``tensors``."""
        path = weight.removesuffix(".base_layer.weight")
        layer: Any = self._skeleton.get_submodule(path)
        inside = dict(saved_form.all_tensors(layer))
        memo: dict[int, Any] = {}
        for name in (weight, *self._adapters[weight]):
            own = inside[name.removeprefix(f"{path}.")]
            values = tensors[name].clone()
            memo[id(own)] = nn.Parameter(values, requires_grad=False) if isinstance(own, nn.Parameter) else values
        copied = copy.deepcopy(layer, memo)
        copied.merge()
        merged: torch.Tensor = copied.base_layer.weight.detach()
        if merged.is_meta:
            raise _cannot_merge(f"{type(layer).__name__} at {path}")
        return merged


def _check_same_adapters(module: Any, skeleton: Any) -> None:
    """Raise `UnsupportedOperationError` where others are active than when the model was prepared."""
    if (now := module.active_adapters) != (then := skeleton.active_adapters):
        raise UnsupportedOperationError(
            f"the adapters {', '.join(now)} of {type(module).__name__} are active, and when it was prepared "
            f"{', '.join(then)} were; set_adapter before prepare"
        )


def _adapters(skeleton: nn.Module) -> dict[str, list[str]]:
    """Names of the tensors of adapters, by the weight that they change. Raises where they change something else."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, list[str]] = {}
    for path, layer in skeleton.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if "weight" not in layer.base_layer._parameters or any(getattr(layer, "lora_bias", {}).values()):
            raise _cannot_merge(f"{type(layer).__name__} at {path}")
        own = [f"{path}.{name}" for name, _ in saved_form.all_tensors(layer) if not name.startswith("base_layer.")]
        found[f"{path}.base_layer.weight"] = own
    return found


def _cannot_merge(what: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"{what} cannot be merged into a weight while the model is streamed. To save it, save the adapters, and merge "
        f"them with PEFT's merge_and_unload where they are loaded; to sync it to an engine, use adapters of another kind"
    )
