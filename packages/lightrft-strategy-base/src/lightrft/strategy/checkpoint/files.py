"""Files that are there, whole, or not at all: written, synchronised with the disk, and published by renaming."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import checksums
from lightrft.strategy.checkpoint.checksums import Checksum
from lightrft.strategy.checkpoint.layout import File, Piece, encode_header

CHUNK = 16 * 2**20
"""Bytes that are copied, summed and written at a time."""


@contextmanager
def naming(path: Path, doing: str) -> Iterator[None]:
    """Turn what the system refuses in the body into a `CheckpointError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{doing} {error.filename or path}: {reason} ({type(error).__name__})") from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def write_tensors(path: Path, pieces: Iterable[tuple[Piece, torch.Tensor]], kind: checksums.Kind) -> File:
    """Write a safetensors file of ``pieces`` with their values, 1-D on any device, and synchronise it.

    At most `CHUNK` bytes are copied at a time, and none where they are in host memory already.
    """
    # Larger elements first: each piece then begins at a multiple of its element's size.
    ordered = sorted(pieces, key=lambda pair: -pair[0].dtype.itemsize)
    blank = checksums.of(b"", kind)
    with naming(path, "cannot write"), path.open("xb", buffering=0) as file:
        header = encode_header([replace(piece, checksum=blank) for piece, _ in ordered])
        _write_all(file.fileno(), header)
        summed = [
            replace(piece, checksum=_write_piece(file.fileno(), values, checksums.begin(kind)))
            for piece, values in ordered
        ]
        header = encode_header(summed)
        os.pwrite(file.fileno(), header, 0)
        os.fsync(file.fileno())
    size = len(header) + sum(piece.nbytes for piece in summed)
    return File(name=path.name, nbytes=size, header=checksums.of(header, kind))


def _write_piece(descriptor: int, values: torch.Tensor, checksum: Checksum) -> str:
    for chunk in values.split(CHUNK // values.element_size()):
        data = bytes_of(chunk.cpu())
        checksum.update(data)
        _write_all(descriptor, data)
    return checksum.hexdigest()


def _write_all(descriptor: int, data: checksums.Buffer) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_text(path: Path, text: str) -> None:
    """Write a new file and synchronise it."""
    with naming(path, "cannot write"), path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Put a file in the place of the one that is there; a reader sees the one or the other."""
    aside = path.with_name(f".{path.name}.writing")
    aside.unlink(missing_ok=True)
    write_text(aside, text)
    rename(aside, path)


def rename(source: Path, target: Path) -> None:
    """Rename within a directory, for good."""
    with naming(source, "cannot rename"):
        source.rename(target)
        synchronise(target.parent)


def synchronise(directory: Path) -> None:
    """Make the names in ``directory`` survive a crash of the host."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
