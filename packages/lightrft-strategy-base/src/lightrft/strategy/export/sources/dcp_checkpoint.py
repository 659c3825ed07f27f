"""Checkpoints of torch.distributed.checkpoint (DCP), which LightRFT's own FSDP strategy wrote.

Their metadata is a pickle. Unpickling replaces the few classes that DCP uses with plain records and refuses all other
classes, so that it cannot run code. Each tensor is assembled from its chunks, without a process group.
"""

import io
import pickle
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from typing_extensions import override

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint.format import DTYPES
from lightrft.strategy.export.sources.source import REMEDY, empty, reading
from lightrft.strategy.export.sources.torch_files import load_safely

METADATA = ".metadata"
_EXPECTED = "metadata of torch.distributed.checkpoint"


class _Record:
    """The attributes of an object of the metadata, without the behaviour of its class."""

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
    ("builtins", "getattr"): _Record,  # with which Python 3.11.0 to 3.11.3 pickle enum members
    ("collections", "OrderedDict"): dict,
    ("torch", "Size"): torch.Size,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPES},
}
"""Replacements for the classes that a metadata file names. A pickle can change instances of records only."""


class DcpSource:
    """The tensors of a checkpoint, under the names of the state dict that was saved."""

    names: Literal["saved", "in memory"] = "in memory"
    opened = nullcontext
    """No file is kept open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path / METADATA, _EXPECTED), (path / METADATA).open("rb") as file:
            metadata: Any = _Unpickler(file).load()
            self._tensors: dict[str, _TensorEntry] = {
                name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, _TensorEntry)
            }
            self.contents: Mapping[str, torch.Tensor] = {
                name: empty(entry.size, entry.properties.dtype) for name, entry in self._tensors.items()
            }
            self._stored = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
            self._check_files()

    def _check_files(self) -> None:
        """Raise `CheckpointError` if a file is missing or too short."""
        for info in self._stored.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(
                    f"expected {self.path / METADATA} to name files in its own directory, got other paths; {REMEDY}"
                )
            file = self.path / info.relative_path
            if not file.is_file() or file.stat().st_size < info.offset + info.length:
                problem = "a file that is too short" if file.exists() else "no such file"
                raise CheckpointError(
                    f"expected at least {info.offset + info.length} bytes in {file}, got {problem}; {REMEDY}"
                )

    def read(self, name: str) -> torch.Tensor:
        """Return a full tensor, assembled from its chunks."""
        entry = self._tensors[name]
        filled = 0
        with reading(self.path / METADATA, _EXPECTED):
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
            for chunk in entry.chunks:
                region = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
                tensor[region] = self._piece(name, chunk.offsets)
                filled += chunk.sizes.numel()
        if filled < tensor.numel():
            raise CheckpointError(f"expected all elements of {name} in {self.path}, found only some; {REMEDY}")
        return tensor

    def _piece(self, name: str, offsets: torch.Size) -> torch.Tensor:
        info = self._stored.get((name, offsets))
        if info is None:
            raise CheckpointError(
                f"expected {self.path / METADATA} to locate every chunk of {name}, got no file for one; {REMEDY}"
            )
        path = self.path / info.relative_path
        with reading(path, "data of torch.distributed.checkpoint"):
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(
                    f"expected plain tensors in {path}, got transformed ones (compressed, for example). Save the checkpoint "
                    f"without transforms"
                )
            with path.open("rb") as file:
                file.seek(info.offset)
                return cast(torch.Tensor, load_safely(io.BytesIO(file.read(info.length))))


class _Unpickler(pickle.Unpickler):
    """Creates records, types and sizes, and nothing else."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not part of such metadata")
        return _KNOWN[module, name]
