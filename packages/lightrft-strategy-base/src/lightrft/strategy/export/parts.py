"""The parts of a model that are written: the full model, or each of its adapters, in separate folders."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.strategy.export.tensor_files import Contents
from lightrft.strategy.models import adapters, hf_metadata, weight_stream
from lightrft.strategy.models.state_dict_adapter import StateDictAdapter, Unit, tied_aliases


@dataclass(frozen=True, kw_only=True)
class ExportPart(ABC):
    """A set of weights with its configuration."""

    converter: weight_stream.WeightConverter
    module: nn.Module
    """Has the configuration."""

    stem = "model"
    """Beginning of the names of its files."""
    folder = ""
    """Folder in the model's directory."""
    splits = True
    """Whether several files are allowed."""

    @abstractmethod
    def write_configuration(self, folder: Path, contents: Contents) -> None:
        """Write the configuration of ``contents``, the weights."""

    def merges(self, unit: Unit) -> bool:
        """Return whether adapters are merged in ``unit``, which takes full precision."""
        return isinstance(self.converter, adapters.MergedAdapters) and self.converter.merges(unit)


@dataclass(frozen=True, kw_only=True)
class WholeModel(ExportPart):
    """All weights of a model."""

    model_class: type[nn.Module]
    """Class of the model before wrapping, which may replace it."""
    generates: nn.Module
    """Has the generation configuration: ``module``, or the PEFT model around it."""

    @override
    def write_configuration(self, folder: Path, contents: Contents) -> None:
        untied = not tied_aliases(self.module).isdisjoint(contents)
        generation_config = hf_metadata.generation_config_of(self.generates)
        hf_metadata.write_configuration(
            self.module,
            self.model_class,
            _dtype_of(contents),
            folder,
            untied=untied,
            generation_config=generation_config,
        )


@dataclass(frozen=True, kw_only=True)
class Adapter(ExportPart):
    """The weights of one adapter: one file, the default adapter's at the top, as PEFT writes them."""

    name: str

    stem = "adapter_model"
    splits = False

    @property
    def folder(self) -> str:  # type: ignore[override]
        """Folder in the model's directory."""
        return "" if self.name == "default" else self.name

    @override
    def write_configuration(self, folder: Path, contents: Contents) -> None:
        hf_metadata.adapter_configuration(self.module, self.name).save_pretrained(folder)


def export_parts(
    module: nn.Module, meta_model: nn.Module, model_class: type[nn.Module], *, merge_adapters: bool = False
) -> Sequence[ExportPart]:
    """Return the parts of ``module``: its adapters, or the full model if it has none or they are merged.

    Args:
        module: The model.
        meta_model: The model, or its copy on the meta device from before wrapping.
        model_class: Class of the model before wrapping.
        merge_adapters: Merge the adapters into the base model.
    """
    if not adapters.has_adapters(module):
        converter = StateDictAdapter.of(module)
        return [WholeModel(converter=converter, module=module, model_class=model_class, generates=module)]
    peft_model: Any = module  # not the copy, whose configuration dates from preparing
    if merge_adapters:
        merged, base = adapters.MergedAdapters(module, meta_model), peft_model.get_base_model()
        return [WholeModel(converter=merged, module=base, model_class=type(base), generates=module)]
    return [
        Adapter(converter=adapters.adapter_converter(module, meta_model, name), module=module, name=name)
        for name in peft_model.peft_config
    ]


def _dtype_of(contents: Contents) -> torch.dtype | None:
    return next((tensor.dtype for tensor in contents.values() if tensor.is_floating_point()), None)
