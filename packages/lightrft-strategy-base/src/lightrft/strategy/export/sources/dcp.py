"""Checkpoints of torch.distributed.checkpoint, which is what LightRFT's own FSDP strategy wrote.

Its metadata is a pickle. It is read with records in the place of the few classes that belong there, and no others, so
that nothing can run or change; and each tensor is put together from its pieces, without a process group.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import override

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint.layout import DTYPES
from lightrft.strategy.export.sources.source import REMEDY, empty, reading
from lightrft.strategy.export.sources.torch_files import load_safely

METADATA = ".metadata"
_EXPECTED = "metadata of torch.distributed.checkpoint"


class _Record:
    """Stands for an object of the metadata: its attributes, without what its class could do with them."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


class _Properties(_Record):
    dtype: torch.dtype

    @override
    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class _TensorEntry(_Record):
    properties: _Properties
    size: torch.Size
    chunks: list[Any]


_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN: dict[tuple[str, str], Any] = {
    (_METADATA, "Metadata"): _Record,
    (_METADATA, "MetadataIndex"): _Record,
    (_METADATA, "ChunkStorageMetadata"): _Record,
    (_METADATA, "TensorStorageMetadata"): _TensorEntry,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "BytesStorageMetadata"): _Record,
    (_METADATA, "StorageMeta"): _Record,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib", "PurePosixPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
    ("builtins", "getattr"): _Record,  # by which Python 3.11.0 to 3.11.3 pickle the members of an enumeration
    ("collections", "OrderedDict"): dict,
    ("torch", "Size"): torch.Size,
    **{("torch", str(it).removeprefix("torch.")): it for it in DTYPES},
}
"""What stands for what a metadata file names. Nothing in it can be changed by a pickle but instances of records."""


class DcpSource:
    """The tensors of a checkpoint, by the names of the state dict that was saved."""

    names: Literal["saved", "in memory"] = "in memory"

    def __init__(self, place: Path) -> None:
        self.place = place
        with reading(place / METADATA, _EXPECTED), (place / METADATA).open("rb") as file:
            metadata: Any = _Unpickler(file).load()
            entries: Mapping[str, Any] = metadata.state_dict_metadata
            self._tensors = {name: it for name, it in entries.items() if isinstance(it, _TensorEntry)}
            self.contents: Mapping[str, torch.Tensor] = {
                name: empty(it.size, it.properties.dtype) for name, it in self._tensors.items()
            }
            self._stored = {(it.fqn, it.offset): info for it, info in metadata.storage_data.items()}
            self._check_files()

    def _check_files(self) -> None:
        """Raise `CheckpointError` where a file is missing, or shorter than what is in it."""
        for info in self._stored.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{self.place / METADATA} names files elsewhere; {REMEDY}")
            path = self.place / info.relative_path
            if not path.is_file() or path.stat().st_size < info.offset + info.length:
                raise CheckpointError(f"{path} is {'too short' if path.exists() else 'missing'}; {REMEDY}")

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Nothing is kept open."""
        yield

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, put together from its pieces."""
        found = self._tensors[name]
        filled = 0
        with reading(self.place / METADATA, _EXPECTED):
            whole = torch.empty(found.size, dtype=found.properties.dtype)
            for chunk in found.chunks:
                place = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
                whole[place] = self._piece(name, chunk.offsets)
                filled += chunk.sizes.numel()
        if filled < whole.numel():
            raise CheckpointError(f"{self.place} lacks a part of {name}; {REMEDY}")
        return whole

    def _piece(self, name: str, offsets: torch.Size) -> torch.Tensor:
        info = self._stored.get((name, offsets))
        if info is None:
            raise CheckpointError(f"{self.place / METADATA} does not say where all of {name} is; {REMEDY}")
        path = self.place / info.relative_path
        with reading(path, "data of torch.distributed.checkpoint"):
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{path} is compressed or transformed; save it again without")
            with path.open("rb") as file:
                file.seek(info.offset)
                piece: torch.Tensor = load_safely(io.BytesIO(file.read(info.length)))
        return piece


class _Unpickler(pickle.Unpickler):
    """Makes records, types and sizes, and nothing else."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no business there")
        return _KNOWN[module, name]
