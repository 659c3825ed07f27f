"""Memory that this process and the server's both see: a bucket of weights is copied into it, and out of it.

It has no name in any file system, so no limit of /dev/shm holds it, and it ends with the last process that has it.
On CUDA there is none: the model's processes open the training's own memory.
"""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

ALIGNMENT = 64
"""Bytes at multiples of which tensors begin, so that each can be viewed in its own type."""
PIECE = 32 << 20
"""Bytes that go through host memory at a time: taking memory costs more than copying, and this much is taken once."""
_WORDS = 1 << 20
"""Of eight bytes, that `checksum` takes at a time."""


def pieces(bucket: Sequence[tuple[str, torch.Tensor]], limit: int) -> Iterator[Sequence[tuple[str, torch.Tensor]]]:
    """A bucket in parts of at most ``limit`` bytes, one larger tensor alone."""
    piece: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in bucket:
        if piece and size + tensor.nbytes > limit:
            yield piece
            piece, size = [], 0
        piece.append((name, tensor))
        size += tensor.nbytes
    if piece:
        yield piece


def layout(bucket: Sequence[tuple[str, torch.Tensor]]) -> tuple[list[dict[str, Any]], int]:
    """Where in one block of memory each tensor goes, and the bytes of the block."""
    entries, end = [], 0
    for name, tensor in bucket:
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "start": end})
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return entries, end


def views(block: torch.Tensor, entries: Sequence[dict[str, Any]]) -> list[tuple[str, torch.Tensor]]:
    """The tensors in a block of bytes."""
    found = []
    for it in entries:
        dtype, shape = getattr(torch, it["dtype"]), torch.Size(it["shape"])
        size = shape.numel() * dtype.itemsize
        found.append((it["name"], block[it["start"] : it["start"] + size].view(dtype).view(shape)))
    return found


def fill(block: torch.Tensor, entries: Sequence[dict[str, Any]], bucket: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Copy a bucket into its block."""
    for (_, target), (_, tensor) in zip(views(block, entries), bucket, strict=True):
        target.copy_(tensor)


def checksum(block: torch.Tensor) -> int:
    """A sum over a block of bytes, of a length that eight divides, in which every byte and its place count."""
    words, total = block.view(torch.int64), torch.zeros((), dtype=torch.int64, device=block.device)
    for start in range(0, len(words), _WORDS):
        part = words[start : start + _WORDS]
        places = torch.arange(2 * start + 1, 2 * (start + len(part)) + 1, 2, device=block.device)
        total += (part * places).sum()
    return int(total)


def to_json(value: Any) -> torch.Tensor:
    """Plain data as a tensor of bytes, to go where only tensors go."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_json(tensor: torch.Tensor) -> Any:
    """What `to_json` was given."""
    return json.loads(bytes(tensor.cpu().numpy()))


class SharedBlock:
    """A block of host memory with a file descriptor by which another process can have it too."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.descriptor = os.memfd_create("lightrft-weights")
        os.ftruncate(self.descriptor, size)
        self._map = mmap.mmap(self.descriptor, size)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def close(self) -> None:
        """Let go of it."""
        del self.bytes
        self._map.close()
        os.close(self.descriptor)
