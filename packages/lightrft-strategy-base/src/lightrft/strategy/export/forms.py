"""Forms of weights that are no whole model as `save_pretrained` writes it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightrft.strategy.rollout.saved_form import Unit


@dataclass(frozen=True, kw_only=True)
class NamedForm:
    """Tensors that have other names elsewhere, or the same, and are otherwise as they are."""

    tensors: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    """Names elsewhere, by names in memory."""

    @property
    def units(self) -> list[Unit]:
        """Each tensor is one."""
        return [[name] for name in self.names]

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors from memory, under their names elsewhere."""
        return {self.names[name]: tensor for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors from elsewhere, under their names in memory."""
        in_memory = {name: key for key, name in self.names.items()}
        return {in_memory[name]: tensor for name, tensor in tensors.items()}


def unchanged(tensors: Mapping[str, torch.Tensor]) -> NamedForm:
    """``tensors`` under the names that they have."""
    return NamedForm(tensors=tensors, names={name: name for name in tensors})
