"""What of a model is written: all of it, or each of its adapters, in a folder of its own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.strategy.export import adapters, companions
from lightrft.strategy.export.tensor_files import Contents
from lightrft.strategy.rollout import weights
from lightrft.strategy.rollout.saved_form import SavedForm, Unit, tied_aliases


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """A set of weights, and what says how they are to be read."""

    form: weights.Form
    module: nn.Module
    """Knows its configuration."""

    stem = "model"
    """What the names of its files begin with."""
    folder = ""
    """Below the directory."""
    splits = True
    """Whether there may be several files."""

    @abstractmethod
    def write_configuration(self, folder: Path, contents: Contents) -> None:
        """Write what says how ``contents``, the weights, are to be read."""

    def merges(self, unit: Unit) -> bool:
        """Whether adapters are merged in ``unit``, which takes full precision."""
        return isinstance(self.form, adapters.MergedForm) and self.form.merges(unit)


@dataclass(frozen=True, kw_only=True)
class WholeModel(Part):
    """All weights of a model."""

    kind: type[nn.Module]
    """Its class, which wrapping may have replaced."""

    @override
    def write_configuration(self, folder: Path, contents: Contents) -> None:
        untied = not tied_aliases(self.module).isdisjoint(contents)
        companions.write_configuration(self.module, self.kind, _dtype_of(contents), folder, untied=untied)


@dataclass(frozen=True, kw_only=True)
class Adapter(Part):
    """The weights of one adapter. PEFT puts the default one at the top, and reads one file."""

    name: str

    stem = "adapter_model"
    splits = False

    @property
    def folder(self) -> str:  # type: ignore[override]
        """Below the directory."""
        return "" if self.name == "default" else self.name

    @override
    def write_configuration(self, folder: Path, contents: Contents) -> None:
        companions.write_adapter_configuration(self.module, self.name, folder)


def parts_of(
    module: nn.Module, skeleton: nn.Module, kind: type[nn.Module], *, merge_adapters: bool = False
) -> Sequence[Part]:
    """What is to be written of ``module``: its adapters where it has some, merged or by themselves, else all of it.

    ``skeleton``: it, or its copy on the meta device from before wrapping. ``kind``: its class from before wrapping.
    """
    if not adapters.has_adapters(module):
        return [WholeModel(form=SavedForm.of(module), module=module, kind=kind)]
    peft_model: Any = skeleton
    if merge_adapters:
        base = peft_model.get_base_model()
        return [WholeModel(form=adapters.MergedForm(module, skeleton), module=base, kind=type(base))]
    return [
        Adapter(form=adapters.adapter_form(module, skeleton, name), module=skeleton, name=name)
        for name in peft_model.peft_config
    ]


def _dtype_of(contents: Contents) -> torch.dtype | None:
    return next((tensor.dtype for tensor in contents.values() if tensor.is_floating_point()), None)
