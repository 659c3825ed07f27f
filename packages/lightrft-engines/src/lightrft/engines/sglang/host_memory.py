"""Frees and reallocates the host memory of tensors on a CPU: SGLang's memory saver works on GPUs only."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator

import torch


class HostMemory:
    """Frees tensors by tag, with their content. It has the interface of SGLang's memory saver."""

    def __init__(
        self, weights: Callable[[], Iterable[torch.Tensor]], kv_cache: Callable[[], Iterable[torch.Tensor]]
    ) -> None:
        """``weights`` and ``kv_cache`` give the tensors of each tag."""
        self._tensors = {"weights": weights, "kv_cache": kv_cache}
        self._sizes: dict[str, list[tuple[torch.UntypedStorage, int]]] = {}

    def pause(self, tag: str) -> None:
        """Free the tensors of ``tag``. Does nothing for another tag, or again."""
        if tag not in self._tensors or tag in self._sizes:
            return
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._tensors[tag]()}
        self._sizes[tag] = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage, _ in self._sizes[tag]:
            storage.resize_(0)
        with contextlib.suppress(AttributeError):  # glibc keeps freed memory unless told to return it
            ctypes.CDLL(None).malloc_trim(0)

    def resume(self, tag: str) -> None:
        """Allocate the tensors of ``tag`` again, with undefined content."""
        for storage, size in self._sizes.pop(tag, ()):
            storage.resize_(size)


def cache_tensors(pool: object) -> Iterator[torch.Tensor]:
    """The tensors of a key-value cache that hold keys and values, without index tables."""
    for name in ("k_buffer", "v_buffer", "kv_buffer"):
        buffers = getattr(pool, name, None)
        yield from (buffers if isinstance(buffers, (list, tuple)) else [] if buffers is None else [buffers])
