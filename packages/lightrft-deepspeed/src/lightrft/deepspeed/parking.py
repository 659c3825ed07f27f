"""Device memory given back for a while, in place: every tensor and every view of it stays what it is."""

from collections.abc import Iterable

import torch


class Parking:
    """Storages of which the contents are in host memory meanwhile.

    ZeRO keeps parameters, gradients and master weights as views of a few flat buffers. Moving tensors one by
    one would tear these apart; emptying and refilling the storages below them does not.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the memory below ``tensors`` to the host, and give it back to the device."""
        storages = {it.untyped_storage().data_ptr(): it.untyped_storage() for it in tensors if it.numel()}
        self._parked = [(storage, _bytes_of(storage).to("cpu", copy=True)) for storage in storages.values()]
        for storage, _ in self._parked:
            storage.resize_(0)

    def come_back(self) -> None:
        """Refill the storages, bit for bit."""
        for storage, copy in self._parked:
            storage.resize_(copy.numel())
            _bytes_of(storage).copy_(copy)
        self._parked = []


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
