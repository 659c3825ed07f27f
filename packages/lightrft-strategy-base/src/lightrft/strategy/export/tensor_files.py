"""Writing safetensors files of tensors that come one after the other, in any order.

What there will be is known before: so the files are laid out first, and each tensor is then written in its place.
Only one tensor is copied at a time, and none that is contiguous in host memory already.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import files

Contents = Mapping[str, torch.Tensor]
"""Tensors on the meta device: the names, shapes and types of what is to be written."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor is written."""

    file: str
    position: int
    """Of the first byte in the file."""
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True, kw_only=True)
class FileLayout:
    """One safetensors file: its header, and the place of each of its tensors."""

    name: str
    header: bytes
    places: Mapping[str, Place]


def split(contents: Contents, limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """``contents`` in order, in parts of at most ``limit`` bytes, one larger tensor alone."""
    part: dict[str, torch.Tensor] = {}
    filled = 0
    for name, tensor in contents.items():
        if part and filled + tensor.nbytes > limit:
            yield part
            part, filled = {}, 0
        part[name] = tensor
        filled += tensor.nbytes
    yield part


def file_layouts(contents: Contents, stem: str, limit: int) -> list[FileLayout]:
    """The files of ``contents``: ``stem.safetensors``, or, beyond ``limit`` bytes, numbered ones."""
    parts = list(split(contents, limit))
    if len(parts) == 1:
        return [_layout(f"{stem}.safetensors", parts[0])]
    return [
        _layout(f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors", part) for number, part in enumerate(parts, 1)
    ]


def _layout(file: str, contents: Contents) -> FileLayout:
    # Larger elements first: each tensor then begins at a multiple of its element's size.
    ordered = sorted(contents.items(), key=lambda item: -item[1].element_size())
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, tensor in ordered:
        begins[name], end = end, end + tensor.nbytes
        table[name] = {
            "dtype": files.type_name(name, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    places = {
        name: Place(file=file, position=len(header) + begins[name], dtype=tensor.dtype, shape=tensor.shape)
        for name, tensor in ordered
    }
    return FileLayout(name=file, header=header, places=places)


def index_of(layouts: Iterable[FileLayout]) -> dict[str, Any]:
    """The index that says in which of several files each tensor is."""
    places = {name: place for layout in layouts for name, place in layout.places.items()}
    return {
        "metadata": {
            "total_parameters": sum(place.shape.numel() for place in places.values()),
            "total_size": sum(place.shape.numel() * place.dtype.itemsize for place in places.values()),
        },
        "weight_map": {name: places[name].file for name in sorted(places)},
    }


class TensorWriter:
    """Files being written; a context manager. `finish` at its end makes sure of what was written."""

    def __init__(self, folder: Path, layouts: Iterable[FileLayout]) -> None:
        self._folder, self._layouts = folder, list(layouts)
        self._places = {name: place for layout in self._layouts for name, place in layout.places.items()}
        self._left = {layout.name: len(layout.places) for layout in self._layouts}
        self._written: set[str] = set()
        self._open: dict[str, BinaryIO] = {}
        self._headers = {layout.name: layout.header for layout in self._layouts}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor, on any device, in the type that was planned."""
        place = self._places.get(name)
        if place is None or name in self._written or tensor.shape != place.shape:
            planned = "nothing" if place is None else f"{tuple(place.shape)}, once"
            raise CheckpointError(f"the model gave {name} {tuple(tensor.shape)}, and planned was {planned}")
        with files.naming(self._folder / place.file, "cannot write"):
            file = self._file(place.file)
            file.seek(place.position)
            file.write(files.bytes_of(tensor.detach().to("cpu", place.dtype).contiguous()))
            self._written.add(name)
            self._left[place.file] -= 1
            if not self._left[place.file]:
                self._end(place.file)

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
        """Write the index, if there are several files. Raises `CheckpointError` where tensors are missing."""
        missing = [name for name in self._places if name not in self._written]
        if missing:
            raise CheckpointError(f"the model gave no {', '.join(missing[:3])} ({len(missing)} tensors in all)")
        if len(self._layouts) > 1:
            stem = self._layouts[0].name.rpartition("-of-")[0].rpartition("-")[0]
            text = json.dumps(index_of(self._layouts), indent=2)
            files.write_text(self._folder / f"{stem}.safetensors.index.json", f"{text}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()
