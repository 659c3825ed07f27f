"""Memory that this process and the server share: a bucket of weights is copied into it, and out of it.

It has no name in any file system, so the limit of /dev/shm does not apply, and it is freed with the last process that
has it. On CUDA there is none: the model's processes open the training's memory.
"""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import torch

from lightrft.strategy.tensors import packed

ALIGNMENT = 64
"""Tensors start at multiples of this many bytes, so that each can be viewed in its own dtype."""
PIECE = 32 << 20
"""Bytes that go through host memory at a time. Allocating costs more than copying, so one block is used again."""
_WORDS = 1 << 20
"""Words of eight bytes that `checksum` reads at a time."""


class Entry(TypedDict):
    """One tensor of a bucket in its block of memory."""

    name: str
    dtype: str
    """Such as "float32"."""
    shape: list[int]
    start: int
    """The position of its first byte."""


def pieces(bucket: Sequence[tuple[str, torch.Tensor]], limit: int) -> Iterator[Sequence[tuple[str, torch.Tensor]]]:
    """Split a bucket into parts of at most ``limit`` bytes; a larger tensor is a separate part."""
    return packed(bucket, lambda named: named[1].nbytes, limit)


def layout(bucket: Sequence[tuple[str, torch.Tensor]]) -> tuple[list[Entry], int]:
    """The place of each tensor in one block of memory, and the size of the block in bytes."""
    entries: list[Entry] = []
    end = 0
    for name, tensor in bucket:
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "start": end})
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return entries, end


def views(block: torch.Tensor, entries: Sequence[Entry]) -> list[tuple[str, torch.Tensor]]:
    """The tensors of ``entries`` as views of a block of bytes."""
    tensors = []
    for entry in entries:
        dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
        end = entry["start"] + shape.numel() * dtype.itemsize
        tensors.append((entry["name"], block[entry["start"] : end].view(dtype).view(shape)))
    return tensors


def fill(block: torch.Tensor, entries: Sequence[Entry], bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Copy a bucket into its block of memory."""
    for (_, target), (_, tensor) in zip(views(block, entries), bucket, strict=True):
        target.copy_(tensor)


def checksum(block: torch.Tensor) -> int:
    """A sum over a block of bytes that depends on every byte and its position. The length is a multiple of eight."""
    words, total = block.view(torch.int64), torch.zeros((), dtype=torch.int64, device=block.device)
    for start in range(0, len(words), _WORDS):
        part = words[start : start + _WORDS]
        factors = torch.arange(2 * start + 1, 2 * (start + len(part)) + 1, 2, device=block.device)
        total += (part * factors).sum()
    return int(total)


def to_json(value: object) -> torch.Tensor:
    """Plain data as a tensor of bytes, for calls that take only tensors."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_json(tensor: torch.Tensor) -> Any:
    """The data that `to_json` was given."""
    return json.loads(bytes(tensor.cpu().numpy()))


class SharedBlock:
    """A block of host memory, with a file descriptor by which another process can map it."""

    def __init__(self, size: int) -> None:
        """Allocate ``size`` bytes."""
        self.size = size
        self.descriptor = os.memfd_create("lightrft-weights")
        os.ftruncate(self.descriptor, size)
        self._map = mmap.mmap(self.descriptor, size)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def close(self) -> None:
        """Unmap it, and close the descriptor."""
        del self.bytes
        self._map.close()
        os.close(self.descriptor)
