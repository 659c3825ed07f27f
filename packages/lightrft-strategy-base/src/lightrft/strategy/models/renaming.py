"""A converter that only renames, for what is not a full model as `save_pretrained` writes it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightrft.strategy.models.state_dict_adapter import Unit


@dataclass(frozen=True, kw_only=True)
class Renaming:
    """Tensors that a checkpoint holds unconverted, under other names or the same."""

    tensors: Mapping[str, torch.Tensor]
    names: Mapping[str, str]
    """Names in the checkpoint, by names in memory."""

    @property
    def units(self) -> list[Unit]:
        """Each tensor is a unit."""
        return [[name] for name in self.names]

    def merges(self, unit: Unit) -> bool:
        """Return False: nothing is merged."""
        return False

    def convert(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors from memory, under their names in the checkpoint."""
        return {self.names[name]: tensor for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors of the checkpoint, under their names in memory."""
        in_memory = {saved: name for name, saved in self.names.items()}
        return {in_memory[name]: tensor for name, tensor in tensors.items()}


def unchanged(tensors: Mapping[str, torch.Tensor]) -> Renaming:
    """Return ``tensors`` under their own names."""
    return Renaming(tensors=tensors, names={name: name for name in tensors})
