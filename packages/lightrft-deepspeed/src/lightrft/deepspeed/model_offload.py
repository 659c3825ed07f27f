"""Frees device memory temporarily, in place: every tensor, and every view of it, stays the same object."""

from collections.abc import Iterable

import torch


class OffloadedStorages:
    """Storages whose contents are temporarily in host memory.

    ZeRO keeps parameters, gradients and master weights as views of a few flat buffers. Moving the tensors one by one
    would separate them from the buffers; emptying and refilling the storages does not.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the storages of ``tensors`` to the host, and free them on the device."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()
        }
        self._copies = [(storage, _bytes_of(storage).to("cpu", copy=True)) for storage in storages.values()]
        for storage, _ in self._copies:
            storage.resize_(0)

    def reload(self) -> None:
        """Refill the storages bit for bit; a second call does nothing."""
        for storage, copy in self._copies:
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy)
        self._copies = []


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
