"""Models with PEFT adapters: the adapters alone, the base model, and the base model with the adapters merged in.

In memory, PEFT puts a prefix before the base model's names, and ``base_layer`` or ``original_module`` where an adapter
wraps a layer. The names come from the meta model, a copy on the meta device that was made before the backend wrapped the
model. Its layers also merge, a copy of one layer at a time, so that merging never changes the model itself.
"""

import copy
import sys
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import nn

from lightrft.config import UnsupportedOperationError
from lightrft.strategy.models import state_dict_adapter
from lightrft.strategy.models.renaming import Renaming
from lightrft.strategy.models.state_dict_adapter import StateDictAdapter, Unit


def has_adapters(module: nn.Module) -> bool:
    """Return whether ``module`` is a PEFT model.

    Raises:
        UnsupportedOperationError: Its adapters were added with transformers' ``add_adapter``.
    """
    if getattr(module, "_hf_peft_config_loaded", False):
        raise UnsupportedOperationError(
            f"expected adapters that were added with peft.get_peft_model, got a {type(module).__name__} whose adapters were "
            f"added with transformers' add_adapter. Use get_peft_model, which keeps the base model separate"
        )
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)


# Adapters alone


def adapter_converter(module: nn.Module, meta_model: nn.Module, adapter: str) -> Renaming:
    """Return one adapter, under the names in PEFT's checkpoint files.

    Args:
        module: The model in training.
        meta_model: Its copy on the meta device.
        adapter: The adapter's name.

    Raises:
        UnsupportedOperationError: PEFT saves something other than the adapter's tensors.
    """
    names, tensors = _adapter_names(meta_model, adapter), dict(state_dict_adapter.all_tensors(module))
    return Renaming(tensors={name: tensors[name] for name in names}, names=names)


def _adapter_names(meta_model: Any, adapter: str) -> dict[str, str]:
    from peft import get_peft_model_state_dict

    config = meta_model.peft_config[adapter]
    if config.is_prompt_learning:
        _check_prompt_is_saved_as_it_is(meta_model, adapter)
    parameters = meta_model.state_dict(keep_vars=True)
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in parameters.items()}
    # With its default, "auto", PEFT looks for the base model's configuration, on the network too.
    embeddings = _trains_embeddings(meta_model)
    for_training, config.inference_mode = (
        config.inference_mode,
        True,
    )  # otherwise PEFT computes the prompt, which has no name
    try:
        adapter_state = get_peft_model_state_dict(
            meta_model, state_dict=state, adapter_name=adapter, save_embedding_layers=embeddings
        )
    finally:
        config.inference_mode = for_training
    in_memory = {id(tensor): name for tensors in (parameters, state) for name, tensor in tensors.items()}
    return {in_memory[id(tensor)]: name for name, tensor in adapter_state.items()}


def _check_prompt_is_saved_as_it_is(meta_model: Any, adapter: str) -> None:
    """Raise `UnsupportedOperationError` for prompts that PEFT computes from other parameters before it saves them."""
    method = meta_model.peft_config[adapter].peft_type.value
    computed = [name for name, _ in meta_model.prompt_encoder[adapter].named_parameters() if name != "embedding.weight"]
    if computed or method not in ("PROMPT_TUNING", "PREFIX_TUNING"):
        raise UnsupportedOperationError(
            f"expected an adapter whose tensors are saved unchanged, got {method} ({adapter}), whose prompt is computed "
            f"from {', '.join(computed[:3]) or 'other tensors'}. Save it with save_ckpt, or use PROMPT_TUNING, "
            f"PREFIX_TUNING without prefix_projection, or LORA"
        )


def _trains_embeddings(model: Any) -> bool:
    """Return whether embeddings train, directly or through adapters. PEFT always saves those that it copied to train."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not hasattr(model, "get_input_embeddings"):
        return False
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    unwrapped = [layer for layer in layers if layer is not None and not isinstance(layer, AuxiliaryTrainingWrapper)]
    return any(parameter.requires_grad for layer in unwrapped for parameter in layer.parameters())


# The base model


def base_converter(module: nn.Module, meta_model: nn.Module) -> StateDictAdapter:
    """Return the base model of ``module``, as in a checkpoint without adapters."""
    base = _base_model(meta_model)
    return _state_dict_adapter(module, base, _base_names(meta_model, base, merged=False), changed=())


def _base_model(meta_model: Any) -> nn.Module:
    return cast(nn.Module, meta_model.get_base_model())


def _state_dict_adapter(
    module: nn.Module, base: nn.Module, names: Mapping[str, str], changed: Collection[str]
) -> StateDictAdapter:
    """Return the tensors of ``module`` that have ``names`` in ``base``; tied ones once, except those in ``changed``."""
    persistent = module.state_dict(keep_vars=True).keys() & names.keys()
    tensors = {name: tensor for name, tensor in state_dict_adapter.all_tensors(module) if name in persistent}
    tied = ((names[name], tensor) for name, tensor in tensors.items() if name not in changed)
    kept = state_dict_adapter.without_ties(tied, state_dict_adapter.tied_aliases(base)).keys() | {
        names[name] for name in changed
    }
    chosen = {name: names[name] for name in tensors if names[name] in kept - state_dict_adapter.ignored_names(base)}
    return StateDictAdapter(module=base, names=chosen, tensors={name: tensors[name] for name in chosen})


def _base_names(meta_model: nn.Module, base: nn.Module, *, merged: bool) -> dict[str, str]:
    """Return names in the base model, by names in memory; tensors of adapters have none.

    Args:
        meta_model: The PEFT model on the meta device.
        base: Its base model.
        merged: Take fully trained modules (PEFT's ``modules_to_save``) instead of the original ones.
    """
    prefix = next(f"{path}." for path, part in meta_model.named_modules() if part is base)
    inside = {
        path: within for path, part in meta_model.named_modules() if (within := _wrapped(part, merged)) is not None
    }
    unwrapped = {name: _without_wrappers(name, inside) for name, _ in state_dict_adapter.all_tensors(meta_model)}
    return {
        name: base_name.removeprefix(prefix)
        for name, base_name in unwrapped.items()
        if base_name is not None and base_name.startswith(prefix)
    }


def _wrapped(part: nn.Module, merged: bool) -> str | None:
    """Return where in ``part`` the base model's layer is, if ``part`` is one of PEFT's wrappers."""
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
    """Return ``name`` without PEFT's wrappers, or None for a tensor that belongs to a wrapper."""
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


def base_without_adapters(meta_model: Any) -> nn.Module:
    """Return the base model of ``meta_model``, from which its adapters are removed.

    Raises:
        UnsupportedOperationError: They cannot be merged into the weights, so that nothing could be synced to that model.
    """
    _check_method_merges(meta_model)
    return cast(nn.Module, meta_model.unload())


# The base model with the adapters merged in


class MergedAdapters:
    """A model with its active adapters merged in, as in a checkpoint of the base model's class."""

    def __init__(self, module: nn.Module, meta_model: nn.Module) -> None:
        _check_same_adapters(module, meta_model)
        _check_method_merges(meta_model)
        self._meta_model, base = meta_model, _base_model(meta_model)
        tensors = dict(state_dict_adapter.all_tensors(module))
        self._adapters = _adapters(meta_model)
        """Names of the adapters' tensors, by the name of the weight into which they are merged."""
        self._base = _state_dict_adapter(
            module, base, _base_names(meta_model, base, merged=True), changed=self._adapters.keys()
        )
        self.tensors = {name: tensors[name] for unit in self.units for name in unit}
        _check_all_merge(meta_model, self.tensors.keys())

    @property
    def units(self) -> list[Unit]:
        """The units of the base model, each weight with its adapters."""
        return [
            [*unit, *(adapter for name in unit for adapter in self._adapters.get(name, ()))]
            for unit in self._base.units
        ]

    def merges(self, unit: Unit) -> bool:
        """Return whether adapters are merged in ``unit``, which needs full precision."""
        return any(name in self._adapters for name in unit)

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return whole units from memory, merged, as in a checkpoint of the base model."""
        merged = {name: tensor for name, tensor in tensors.items() if name in self._base.names}
        for name in merged.keys() & self._adapters.keys():
            if not merged[name].is_meta:
                merged[name] = self._merge(name, tensors)
        return self._base.convert(merged)

    def _merge(self, weight: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the merged weight, computed by PEFT on a copy of one layer that holds copies of ``tensors``."""
        path = weight.removesuffix(".base_layer.weight")
        layer: Any = self._meta_model.get_submodule(path)
        inside = dict(state_dict_adapter.all_tensors(layer))
        memo: dict[int, Any] = {}
        for name in (weight, *self._adapters[weight]):
            empty = inside[name.removeprefix(f"{path}.")]
            values = tensors[name].clone()
            memo[id(empty)] = nn.Parameter(values, requires_grad=False) if isinstance(empty, nn.Parameter) else values
        copied = copy.deepcopy(layer, memo)
        try:
            copied.merge()
        except NotImplementedError as error:
            raise _cannot_merge(f"{type(layer).__name__} at {path}") from error
        merged: torch.Tensor = copied.base_layer.weight.detach()
        if merged.is_meta:
            raise _cannot_merge(f"{type(layer).__name__} at {path}")
        return merged


def _check_same_adapters(module: Any, meta_model: Any) -> None:
    """Raise `UnsupportedOperationError` if other adapters are active than when the model was prepared."""
    if (active := module.active_adapters) != (prepared := meta_model.active_adapters):
        raise UnsupportedOperationError(
            f"expected the adapters of {type(module).__name__} that were active when it was prepared "
            f"({', '.join(prepared)}), got {', '.join(active)}. Call set_adapter before prepare"
        )


def _check_method_merges(meta_model: Any) -> None:
    """Raise `UnsupportedOperationError` for PEFT methods that add inputs or layers instead of changing weights."""
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(meta_model.base_model, BaseTuner):
        methods = ", ".join(meta_model.peft_config[adapter].peft_type.value for adapter in meta_model.active_adapters)
        raise UnsupportedOperationError(
            f"expected adapters that can be merged into a weight, got {methods}, which changes no weight of the base model. "
            f"Save the adapter alone, with merge_adapters=False. To sync to an engine, use another method, such as LORA"
        )


def _check_all_merge(meta_model: Any, merged: Collection[str]) -> None:
    """Raise `UnsupportedOperationError` for active adapters with tensors that are not among the ``merged`` ones."""
    tensors = dict(state_dict_adapter.all_tensors(meta_model))
    known = {id(tensors[name]) for name in merged}
    for adapter in meta_model.active_adapters:
        for name in _adapter_names(meta_model, adapter):
            if id(tensors[name]) not in known:
                raise _cannot_merge(f"{meta_model.peft_config[adapter].peft_type.value} with {name}")


def _adapters(meta_model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the adapters' tensors, by the weight that they change.

    Raises:
        UnsupportedOperationError: An adapter changes something other than a weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters: dict[str, list[str]] = {}
    for path, layer in meta_model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if "weight" not in layer.base_layer._parameters or any(getattr(layer, "lora_bias", {}).values()):
            raise _cannot_merge(f"{type(layer).__name__} at {path}")
        adapters[f"{path}.base_layer.weight"] = [
            f"{path}.{name}" for name, _ in state_dict_adapter.all_tensors(layer) if not name.startswith("base_layer.")
        ]
    return adapters


def _cannot_merge(adapter: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"expected adapters that can be merged into a weight, got {adapter}. To save the model, save the adapters alone, "
        f"and merge them with PEFT's merge_and_unload after loading. To sync it to an engine, use another type of adapter"
    )
