"""Reading one checkpoint: its manifest, the headers of its files, their checksums, and any range of any entry.

Needs no strategy and no process group, so that converters read with it too. An error is a `CheckpointError` that names
the file.
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
from typing import Any, Self

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import format
from lightrft.strategy.checkpoint.format import CHUNK, File, Manifest, Piece
from lightrft.strategy.checkpoint.store import read_manifest
from lightrft.strategy.storage import files
from lightrft.strategy.tensors import grouped, memory_of, packed

THREADS = 2
"""Reading and computing checksums release the GIL."""
BATCH = 32 * 2**20
"""Bytes of a task for a thread, so that small pieces do not cost a task each."""
_VERIFIED = 2 * 2**20
"""Bytes that are read and summed at a time: they fit the processor's cache."""


class CheckpointReader:
    """A committed checkpoint, open for reading; a context manager."""

    def __init__(self, path: Path) -> None:
        """Read the manifest of the checkpoint at ``path`` and open its files."""
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._paths = [path / file.name for file in self.manifest.files]
        self._descriptors: list[int] = []
        self._shapes: dict[str, Mapping[str, torch.Size]] = {}
        try:
            for file in self.manifest.files:
                self._descriptors.append(self._open(file))
        except BaseException:
            self.close()
            raise

    def _open(self, file: File) -> int:
        path = self.path / file.name
        with files.explain_os_errors(path, "cannot open"):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                raise self._damaged(path, "it is missing") from error
        size = os.fstat(descriptor).st_size
        if size != file.nbytes:
            os.close(descriptor)
            raise self._damaged(path, f"it has {size} bytes instead of {file.nbytes}")
        return descriptor

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _damaged(self, path: Path, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is damaged: {reason}. Nothing was loaded from {self.path.name!r}; load another tag"
        )

    # Contents

    @cached_property
    def pieces(self) -> list[tuple[int, Piece]]:
        """Every piece, with the index of its file. Verifies the checksums of the headers."""
        return [(index, piece) for index in range(len(self._descriptors)) for piece in self._header(index)]

    def _header(self, index: int) -> list[Piece]:
        file, descriptor, path = self.manifest.files[index], self._descriptors[index], self._paths[index]
        with files.explain_os_errors(path, "cannot read"):
            try:
                header = os.pread(descriptor, format.header_length(os.pread(descriptor, 8, 0), file.nbytes), 0)
                pieces, stamp = format.decode_header(header)
                if stamp != self.manifest.stamp:
                    raise CheckpointError(f"it was written by another save (tag {stamp.tag!r}) than its manifest")
                if files.checksum_of(header, self.manifest.checksum) != file.header:
                    raise CheckpointError("its header does not match its checksum in the manifest")
                return pieces
            except CheckpointError as error:
                raise self._damaged(path, str(error)) from error

    @cached_property
    def index(self) -> Mapping[str, Sequence[tuple[int, Piece]]]:
        """The pieces of each entry, with the index of their file, by offset."""
        index = grouped((piece.entry, (number, piece)) for number, piece in self.pieces)
        for group in index.values():
            group.sort(key=lambda entry: (entry[1].offset, entry[1].numel))
        return index

    @property
    def state(self) -> dict[str, Any]:
        """Everything that is not a tensor."""
        return self.manifest.state

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(self.state["models"])

    def shapes(self, prefix: str) -> Mapping[str, torch.Size]:
        """Return the full shapes of the entries that begin with ``prefix``, by the rest of their names."""
        if prefix not in self._shapes:
            self._shapes[prefix] = {
                entry.removeprefix(prefix): torch.Size(pieces[0][1].shape)
                for entry, pieces in self.index.items()
                if entry.startswith(prefix)
            }
        return self._shapes[prefix]

    def dtypes(self, prefix: str) -> dict[str, torch.dtype]:
        """Return the dtypes of the entries that begin with ``prefix``, by the rest of their names."""
        return {name: self.index[prefix + name][0][1].dtype for name in self.shapes(prefix)}

    # Verifying

    def verify(self) -> None:
        """Read everything and compare the checksums."""
        with self.verifying():
            pass

    @contextmanager
    def verifying(self, selected: Callable[[int, int], bool] = lambda file, piece: True) -> Iterator[None]:
        """Verify pieces while the body runs, and wait for the end.

        If the body fails and a piece is damaged, the damage is raised: it may be the cause.

        Args:
            selected: Whether to verify a piece, from the index of its file and its own index.
        """
        chosen = [pair for number, pair in enumerate(self.pieces) if selected(pair[0], number)]
        thread = threading.local()  # keeps its buffer: making one costs more than filling it

        def verify(batch: Sequence[tuple[int, Piece]]) -> None:
            if not hasattr(thread, "buffer"):
                thread.buffer = memoryview(mmap.mmap(-1, _VERIFIED))  # whole pages: the fastest target to copy to
            self._verify(batch, thread.buffer)

        with self._threads() as pool:
            results = pool.map(verify, packed(chosen, lambda pair: pair[1].nbytes, BATCH))
            try:
                yield
            except Exception:
                deque(results, maxlen=0)
                raise
            else:
                deque(results, maxlen=0)
            finally:
                pool.shutdown(cancel_futures=True)

    def _verify(self, batch: Sequence[tuple[int, Piece]], buffer: memoryview) -> None:
        for index, piece in batch:
            checksum = files.new_checksum(self.manifest.checksum)
            for start in range(0, piece.nbytes, _VERIFIED):
                view = buffer[: min(_VERIFIED, piece.nbytes - start)]
                self._read(index, view, piece.position + start)
                checksum.update(view)
            if checksum.hexdigest() != piece.checksum:
                raise self._damaged(self._paths[index], f"{piece.entry} does not match its checksum")

    # Values

    def read(self, wanted: Iterable[tuple[str, int, torch.Tensor]]) -> None:
        """Fill tensors, on any device and of any dtype, from ranges of entries.

        Args:
            wanted: Entry, index of the first element in it, and the tensor to fill.
        """
        with self._threads() as pool:
            deque(pool.map(self._fill_all, packed(wanted, lambda entry: entry[2].nbytes, BATCH)), maxlen=0)

    def _fill_all(self, batch: Sequence[tuple[str, int, torch.Tensor]]) -> None:
        for entry, offset, values in batch:
            self._fill(entry, offset, values)

    def tensor(self, entry: str) -> torch.Tensor:
        """Return an entry in full, in the dtype in which it is stored."""
        if entry not in self.index:
            raise CheckpointError(f"expected {entry} in {self.path}, found none. Load another tag")
        piece = self.index[entry][0][1]
        tensor = torch.empty(piece.shape, dtype=piece.dtype)
        self._fill(entry, 0, tensor.view(-1))
        return tensor

    def _fill(self, entry: str, offset: int, values: torch.Tensor) -> None:
        if values.ndim != 1:  # a full tensor that is not contiguous
            row = torch.empty(values.numel(), dtype=values.dtype)
            self._fill(entry, offset, row)
            values.copy_(row.view(values.shape))
            return
        done, direct = 0, values.device.type == "cpu" and values.is_contiguous()
        for index, piece, start, length in fragments(self.index, entry, offset, values.numel()):
            position = piece.position + start * piece.dtype.itemsize
            part = values[done : done + length]
            if direct and values.dtype == piece.dtype:
                self._read(index, memory_of(part), position)
            else:
                self._convert(index, position, piece.dtype, part)
            done += length

    def _convert(self, index: int, position: int, dtype: torch.dtype, values: torch.Tensor) -> None:
        """Read through a buffer into ``values``, which are on another device or of another dtype."""
        for part in values.split(CHUNK // dtype.itemsize):
            buffer = torch.empty(part.numel(), dtype=dtype)
            self._read(index, memory_of(buffer), position)
            part.copy_(buffer)
            position += buffer.nbytes

    def _read(self, index: int, buffer: memoryview, position: int) -> None:
        with files.explain_os_errors(self._paths[index], "cannot read"):
            while buffer:
                count = os.preadv(self._descriptors[index], [buffer], position)
                if not count:
                    raise self._damaged(self._paths[index], "it ends too early")
                buffer, position = buffer[count:], position + count

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="lightrft-read")


Fragment = tuple[int, Piece, int, int]
"""Index of a file, a piece in it, and the first element and the number of elements to take of that piece."""


def fragments(
    index: Mapping[str, Sequence[tuple[int, Piece]]], entry: str, offset: int, numel: int
) -> Iterator[Fragment]:
    """Yield the fragments that make up ``numel`` elements of ``entry`` from ``offset`` on, in order.

    Raises:
        CheckpointError: Elements are in no file.
    """
    reached, end = offset, offset + numel
    for file, piece in index.get(entry, ()):
        begin, stop = piece.offset, piece.offset + piece.numel
        if begin <= reached < stop and reached < end:
            length = min(stop, end) - reached
            yield file, piece, reached - begin, length
            reached += length
    if reached < end:
        raise CheckpointError(
            f"expected elements {reached} to {end} of {entry} in the files, found none. Load another tag"
        )
