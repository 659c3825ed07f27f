"""Files that are there, whole, or not at all: written, synchronised with the disk, and published by renaming."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy import flat
from lightrft.strategy.checkpoint import checksums, layout
from lightrft.strategy.checkpoint.checksums import Checksum
from lightrft.strategy.checkpoint.layout import DTYPES, File, Piece, Stamp, encode_header

CHUNK = 16 * 2**20
"""Bytes that are copied, summed and written at a time."""
_REMEDIES = {
    errno.ENOSPC: "free some space there, or give another directory",
    errno.EDQUOT: "free some space there, or give another directory",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "let this user do that, or give another directory",
    errno.EPERM: "let this user do that, or give another directory",
    errno.EEXIST: "remove it, or use another tag or directory",
    errno.ENAMETOOLONG: "use a shorter tag",
    errno.ENOENT: "it was removed meanwhile: keep others from doing that",
}


@contextmanager
def naming(path: Path, doing: str) -> Iterator[None]:
    """Turn what the system refuses in the body into a `CheckpointError` that names ``path``, and says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "see to it, or give another directory")
        raise CheckpointError(
            f"{doing} {error.filename or path}: {reason} ({type(error).__name__}); {remedy}"
        ) from error


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = flat.as_bytes(tensor).numpy()
    return memoryview(array)


def type_name(tensor: str, dtype: torch.dtype) -> str:
    """safetensors' name of ``dtype``. Raises `CheckpointError` that names ``tensor`` where it has none."""
    if dtype not in DTYPES:
        supported = ", ".join(str(it).removeprefix("torch.") for it in DTYPES)
        raise CheckpointError(f"{tensor} is {dtype}, which these files cannot hold; they hold {supported}: cast it")
    return DTYPES[dtype]


def write_tensors(path: Path, pieces: Iterable[tuple[Piece, torch.Tensor]], stamp: Stamp, kind: checksums.Kind) -> File:
    """Write a safetensors file of ``pieces`` with their values, 1-D on any device, and synchronise it.

    At most `CHUNK` bytes are copied at a time, and none where they are in host memory already.
    """
    ordered = sorted(pieces, key=lambda pair: layout.place(pair[0]))
    blank = checksums.of(b"", kind)
    with naming(path, "cannot write"), path.open("xb", buffering=0) as file:
        header = encode_header([replace(piece, checksum=blank) for piece, _ in ordered], stamp)
        _write_all(file.fileno(), header)
        summed = [
            replace(piece, checksum=_write_piece(file.fileno(), values, checksums.begin(kind)))
            for piece, values in ordered
        ]
        header = encode_header(summed, stamp)
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


def make_directory(path: Path) -> None:
    """Make a directory and those above it, for good, where they are missing."""
    missing = [it for it in (path, *path.parents) if not it.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        synchronise(made.parent)


def synchronise_all(directory: Path) -> None:
    """Make all that is below ``directory`` survive a crash of the host."""
    for folder, _, names in os.walk(directory):
        for path in (Path(folder), *(Path(folder, name) for name in names)):
            synchronise(path)


def synchronise(path: Path) -> None:
    """Make a file, or the names in a directory, survive a crash of the host."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
