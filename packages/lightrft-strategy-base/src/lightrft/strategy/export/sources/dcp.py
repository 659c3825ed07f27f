"""Checkpoints of torch.distributed.checkpoint, which is what LightRFT's own FSDP strategy wrote.

Its metadata is a pickle. It is read with the few classes that belong there and no others, so that nothing can run;
and each tensor is put together from its pieces, without a process group.
"""

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightrft.config import CheckpointError
from lightrft.strategy.export.sources.source import REMEDY, empty, reading

METADATA = ".metadata"
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "TensorProperties",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class DcpSource:
    """The tensors of a checkpoint, by the names of the state dict that was saved."""

    names: Literal["saved", "in memory"] = "in memory"

    def __init__(self, place: Path) -> None:
        self.place = place
        with reading(place / METADATA), (place / METADATA).open("rb") as file:
            self._metadata: Any = _Unpickler(file).load()
        self._tensors = {
            name: it for name, it in self._metadata.state_dict_metadata.items() if isinstance(it, TensorStorageMetadata)
        }
        self.contents: Mapping[str, torch.Tensor] = {
            name: empty(it.size, it.properties.dtype) for name, it in self._tensors.items()
        }
        self._stored = {(it.fqn, it.offset): info for it, info in self._metadata.storage_data.items()}
        self._check_files()

    def _check_files(self) -> None:
        """Raise `CheckpointError` where a file is missing, or shorter than what is in it."""
        for info in self._stored.values():
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
        whole = torch.empty(found.size, dtype=found.properties.dtype)
        filled = 0
        for chunk in found.chunks:
            place = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
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
        with reading(path):
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{path} is compressed or transformed; save it again without")
            with path.open("rb") as file:
                file.seek(info.offset)
                piece: torch.Tensor = torch.load(
                    io.BytesIO(file.read(info.length)), map_location="cpu", weights_only=True
                )
        return piece


class _Unpickler(pickle.Unpickler):
    """Makes the classes of a checkpoint's metadata, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise CheckpointError(
                f"a checkpoint's metadata has no business with {module}.{name}, and it was not read; "
                f"the file is not what torch.distributed.checkpoint writes"
            )
        return super().find_class(module, name)
