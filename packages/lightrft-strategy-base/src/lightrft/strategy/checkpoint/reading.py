"""Reading a checkpoint: its manifest, the heads of its files, their checksums, and any range of any entry.

Needs no strategy and no process group: converters read with it too. What is wrong with a file is a
`CheckpointError` that names it.
"""

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import checksums, files, layout, ranges
from lightrft.strategy.checkpoint.layout import Manifest, Piece
from lightrft.strategy.checkpoint.store import read_manifest

THREADS = 2
"""Reading and summing let go of Python's lock."""
_SUMMED = 2 * 2**20
"""Bytes that are read and summed at a time: few enough to stay in the processor's cache."""

T = TypeVar("T")


class Checkpoint:
    """A committed checkpoint, open for reading; a context manager."""

    def __init__(self, path: Path) -> None:
        """Read the manifest of the checkpoint at ``path``, and open its files."""
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._places = [path / file.name for file in self.manifest.files]
        self._descriptors: list[int] = []
        self._names: dict[str, Mapping[str, torch.Size]] = {}
        try:
            for file in self.manifest.files:
                self._descriptors.append(self._open(file))
        except BaseException:
            self.close()
            raise

    def _open(self, file: layout.File) -> int:
        place = self.path / file.name
        try:
            descriptor = os.open(place, os.O_RDONLY)
        except OSError as error:
            raise self._damaged(place, f"it cannot be opened ({error.strerror})") from error
        found = os.fstat(descriptor).st_size
        if found != file.nbytes:
            os.close(descriptor)
            raise self._damaged(place, f"it has {found} bytes, and the manifest says {file.nbytes}")
        return descriptor

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _damaged(self, place: Path, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{place} is damaged: {reason}; nothing was loaded from {self.path.name!r}, load another tag"
        )

    # What there is

    @cached_property
    def pieces(self) -> list[tuple[int, Piece]]:
        """Every piece, with the index of its file; the headers' checksums are verified."""
        return [(index, piece) for index in range(len(self._descriptors)) for piece in self._header(index)]

    def _header(self, index: int) -> list[Piece]:
        file, descriptor, place = self.manifest.files[index], self._descriptors[index], self._places[index]
        with files.naming(place, "cannot read"):
            try:
                header = os.pread(descriptor, layout.header_length(os.pread(descriptor, 8, 0), file.nbytes), 0)
                pieces, stamp = layout.decode_header(header)
                if stamp != self.manifest.stamp:
                    raise CheckpointError(f"it is of another save, of tag {stamp.tag!r}, than the manifest beside it")
                if checksums.of(header, self.manifest.checksum) != file.header:
                    raise CheckpointError("its header does not fit its checksum in the manifest")
                return pieces
            except CheckpointError as error:
                raise self._damaged(place, str(error)) from error

    @cached_property
    def index(self) -> Mapping[str, Sequence[tuple[int, Piece]]]:
        """The pieces of each entry, in order."""
        return layout.by_entry(self.pieces)

    @property
    def state(self) -> dict[str, Any]:
        """What the manifest has beside the files."""
        return self.manifest.state

    @property
    def models(self) -> list[str]:
        """Names of the models in it."""
        return list(self.state["models"])

    def names(self, prefix: str) -> Mapping[str, torch.Size]:
        """What follows ``prefix`` in the entries that begin with it, with the whole shapes."""
        if prefix not in self._names:
            self._names[prefix] = {
                entry.removeprefix(prefix): torch.Size(found[0][1].shape)
                for entry, found in self.index.items()
                if entry.startswith(prefix)
            }
        return self._names[prefix]

    def types(self, prefix: str) -> dict[str, torch.dtype]:
        """The types of what `names` names."""
        return {name: self.index[prefix + name][0][1].dtype for name in self.names(prefix)}

    # Checking

    def verify(self) -> None:
        """Read everything, and compare the checksums."""
        with self.verifying():
            pass

    @contextmanager
    def verifying(self, mine: Callable[[int, int], bool] = lambda file, piece: True) -> Iterator[None]:
        """Verify, while the body does something else, and to the end: the pieces for which ``mine``.

        ``mine``: of the index of the file and that of the piece. Where the body fails and a piece is damaged, the
        damage is what is raised: it may be why the body failed.
        """
        chosen = [pair for number, pair in enumerate(self.pieces) if mine(pair[0], number)]
        own = threading.local()  # a thread keeps its buffer: making one costs more than filling it

        def verify(batch: Sequence[tuple[int, Piece]]) -> None:
            if not hasattr(own, "buffer"):
                own.buffer = memoryview(mmap.mmap(-1, _SUMMED))  # whole pages, to which the system copies fastest
            self._verify(batch, own.buffer)

        with self._threads() as pool:
            found = pool.map(verify, _batches(chosen, [piece.nbytes for _, piece in chosen]))
            try:
                yield
            except Exception:
                deque(found, maxlen=0)
                raise
            else:
                deque(found, maxlen=0)
            finally:
                pool.shutdown(cancel_futures=True)

    def _verify(self, batch: Sequence[tuple[int, Piece]], buffer: memoryview) -> None:
        for index, piece in batch:
            checksum = checksums.begin(self.manifest.checksum)
            for start in range(0, piece.nbytes, _SUMMED):
                view = buffer[: min(_SUMMED, piece.nbytes - start)]
                self._read(index, view, piece.position + start)
                checksum.update(view)
            if checksum.hexdigest() != piece.checksum:
                raise self._damaged(self._places[index], f"{piece.entry} does not fit its checksum")

    # Values

    def read(self, wanted: Iterable[tuple[str, int, torch.Tensor]]) -> None:
        """Fill tensors, on any device and of any type, with the ranges that begin at their offset in their entry."""
        chosen = list(wanted)
        with self._threads() as pool:
            deque(pool.map(self._fill_all, _batches(chosen, [values.nbytes for *_, values in chosen])), maxlen=0)

    def _fill_all(self, batch: Sequence[tuple[str, int, torch.Tensor]]) -> None:
        for entry, offset, values in batch:
            self._fill(entry, offset, values)

    def tensor(self, entry: str) -> torch.Tensor:
        """A whole entry, in the type in which it is stored."""
        if entry not in self.index:
            raise CheckpointError(f"there is no {entry} in {self.path}")
        piece = self.index[entry][0][1]
        whole = torch.empty(piece.shape, dtype=piece.dtype)
        self._fill(entry, 0, whole.view(-1))
        return whole

    def _fill(self, entry: str, offset: int, values: torch.Tensor) -> None:
        if values.ndim != 1:  # whole, and its memory is in another order
            row = torch.empty(values.numel(), dtype=values.dtype)
            self._fill(entry, offset, row)
            values.copy_(row.view(values.shape))
            return
        done, direct = 0, values.device.type == "cpu" and values.is_contiguous()
        for index, piece, start, length in ranges.fragments(self.index, entry, offset, values.numel()):
            position = piece.position + start * piece.dtype.itemsize
            part = values[done : done + length]
            if direct and values.dtype == piece.dtype:
                self._read(index, files.bytes_of(part), position)
            else:
                self._convert(index, position, piece.dtype, part)
            done += length

    def _convert(self, index: int, position: int, dtype: torch.dtype, values: torch.Tensor) -> None:
        """Read into ``values`` by way of a buffer: they are elsewhere, or of another type."""
        for part in values.split(files.CHUNK // dtype.itemsize):
            buffer = torch.empty(part.numel(), dtype=dtype)
            self._read(index, files.bytes_of(buffer), position)
            part.copy_(buffer)
            position += buffer.nbytes

    def _read(self, index: int, buffer: memoryview, position: int) -> None:
        with files.naming(self._places[index], "cannot read"):
            while buffer:
                count = os.preadv(self._descriptors[index], [buffer], position)
                if not count:
                    raise self._damaged(self._places[index], "it ends too early")
                buffer, position = buffer[count:], position + count

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="lightrft-read")


def _batches(items: Sequence[T], sizes: Sequence[int], most: int = 32 * 2**20) -> Iterator[Sequence[T]]:
    """``items`` in order, some megabytes at a time, so that small ones do not cost a task each."""
    start, held = 0, 0
    for end, size in enumerate(sizes, 1):
        held += size
        if held >= most or end == len(items):
            yield items[start:end]
            start, held = end, 0
