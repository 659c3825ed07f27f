"""Writing safetensors files of tensors that arrive one at a time, in any order.

The contents are known in advance: the files are laid out first, and each tensor is then written at its position. At most one
tensor is copied at a time, and none that is contiguous in host memory.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint.format import dtype_name
from lightrft.strategy.storage import files
from lightrft.strategy.tensors import memory_of, packed

Contents = Mapping[str, torch.Tensor]
"""Names, shapes and dtypes of what is written, as tensors on the meta device."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The position of a tensor in the files."""

    file: str
    position: int
    """Position of the first byte in the file."""
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """One safetensors file: its header, and the slot of each tensor."""

    name: str
    header: bytes
    slots: Mapping[str, Slot]


def file_layouts(contents: Contents, stem: str, limit: int) -> list[FileLayout]:
    """Return the files of ``contents``: ``stem.safetensors``, or numbered files above ``limit`` bytes."""
    parts = list(map(dict, packed(contents.items(), lambda item: item[1].nbytes, limit))) or [{}]
    if len(parts) == 1:
        return [_layout(f"{stem}.safetensors", parts[0])]
    return [
        _layout(f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors", part) for number, part in enumerate(parts, 1)
    ]


def _layout(file: str, contents: Contents) -> FileLayout:
    # Larger elements first, so that each tensor is aligned to its element size.
    ordered = sorted(contents.items(), key=lambda item: -item[1].element_size())
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, tensor in ordered:
        begins[name], end = end, end + tensor.nbytes
        table[name] = {
            "dtype": dtype_name(name, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    slots = {
        name: Slot(file=file, position=len(header) + begins[name], dtype=tensor.dtype, shape=tensor.shape)
        for name, tensor in ordered
    }
    return FileLayout(name=file, header=header, slots=slots)


def index_of(layouts: Iterable[FileLayout]) -> dict[str, Any]:
    """Return the index, which has the file of each tensor."""
    slots = {name: slot for layout in layouts for name, slot in layout.slots.items()}
    return {
        "metadata": {
            "total_parameters": sum(slot.shape.numel() for slot in slots.values()),
            "total_size": sum(slot.shape.numel() * slot.dtype.itemsize for slot in slots.values()),
        },
        "weight_map": {name: slots[name].file for name in sorted(slots)},
    }


class TensorWriter:
    """Files being written; a context manager. `finish` checks that all tensors were written."""

    def __init__(self, folder: Path, layouts: Iterable[FileLayout]) -> None:
        self._folder, self._layouts = folder, list(layouts)
        self._slots = {name: slot for layout in self._layouts for name, slot in layout.slots.items()}
        self._remaining = {layout.name: len(layout.slots) for layout in self._layouts}
        self._written: set[str] = set()
        self._open: dict[str, BinaryIO] = {}
        self._headers = {layout.name: layout.header for layout in self._layouts}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a full tensor, on any device, in the planned dtype."""
        slot = self._slots.get(name)
        if slot is None or name in self._written or tensor.shape != slot.shape:
            planned = "no such tensor" if slot is None else f"one of shape {tuple(slot.shape)}, once"
            raise CheckpointError(
                f"expected {planned}, got {name} of shape {tuple(tensor.shape)}. This is a bug: please report it"
            )
        with files.explain_os_errors(self._folder / slot.file, "cannot write"):
            file = self._file(slot.file)
            file.seek(slot.position)
            file.write(memory_of(tensor.detach().to("cpu", slot.dtype).contiguous()))
            self._written.add(name)
            self._remaining[slot.file] -= 1
            if not self._remaining[slot.file]:
                self._end(slot.file)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._open:
            self._open[name] = (self._folder / name).open("xb")
            self._open[name].write(self._headers[name])
        return self._open[name]

    def _end(self, name: str) -> None:
        with self._open.pop(name) as file:
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the index, if there are several files. Raise `CheckpointError` if tensors are missing."""
        missing = [name for name in self._slots if name not in self._written]
        if missing:
            raise CheckpointError(
                f"expected {len(missing)} more tensors, such as {', '.join(missing[:3])}, got none. This is a bug: please report it"
            )
        if len(self._layouts) > 1:
            stem = self._layouts[0].name.rpartition("-of-")[0].rpartition("-")[0]
            text = json.dumps(index_of(self._layouts), indent=2)
            files.write_text(self._folder / f"{stem}.safetensors.index.json", f"{text}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()
