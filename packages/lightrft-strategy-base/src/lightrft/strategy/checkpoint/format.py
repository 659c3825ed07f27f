"""The format: what a checkpoint is on disk.

    SAVE_DIR/
      latest                             the tag of the newest checkpoint, for people and tools
      TAG/
        manifest.json                    everything that is not a tensor, and the checksums of the files' headers
        rank-00000-of-00002.safetensors  what rank 0 of 2 wrote; its header has the checksums of its tensors

The manifest and the files carry the tag and the nonce of their save, so that files of two saves cannot be mixed.

An entry is one tensor of the state:

    MODEL/parameters/NAME           in master precision
    MODEL/optimizer/STATE/NAME      for example exp_avg; ``step`` is a single number
    MODEL/buffers/NAME              persistent buffers that are the same on all ranks
    ranks/R/buffers/MODEL/NAME      other buffers, of rank R
    ranks/R/random/STREAM           random streams of rank R

Ranks write pieces of entries: ranges of the flattened tensor. In a file, a piece is a 1-D tensor named ENTRY@OFFSET, and
the header's metadata has the shape of the full tensor. Reading needs no pickle and no code outside this package.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.storage import files
from lightrft.strategy.storage.files import Checksum, ChecksumKind
from lightrft.strategy.tensors import memory_of

VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
RANKS = "ranks"
"""The first part of the entries of single ranks; no model has this name."""
CHUNK = 16 * 2**20
"""Bytes that are copied, summed and written at a time."""
_METADATA = "lightrft"
_MAX_HEADER = 2**30
_CACHE_LINE = 64
"""Bytes. torch aligns memory to it, and copies between two aligned addresses take half the time."""

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names of dtypes."""
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def dtype_name(tensor: str, dtype: torch.dtype) -> str:
    """Return safetensors' name of ``dtype``. Raise `CheckpointError`, which names ``tensor``, if it has none."""
    if dtype not in DTYPES:
        supported = ", ".join(str(supported_dtype).removeprefix("torch.") for supported_dtype in DTYPES)
        raise CheckpointError(
            f"expected {tensor} to have a dtype that files support ({supported}), got {dtype}. Cast it"
        )
    return DTYPES[dtype]


# The files of the ranks


def file_name(rank: int, ranks: int) -> str:
    """Return the name of the file that ``rank`` of ``ranks`` writes."""
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of one entry, in one file."""

    entry: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the full tensor."""
    offset: int
    """Index of the first element in the flattened full tensor."""
    numel: int
    checksum: str = ""
    position: int = 0
    """Position of the first byte in the file."""

    @property
    def key(self) -> str:
        """Name in the file."""
        return f"{self.entry}@{self.offset}"

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Identifies one save: shared by its manifest and its files, and by no other save."""

    tag: str
    nonce: str


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a checkpoint."""

    name: str
    nbytes: int
    header: str
    """Checksum of the header, which holds the checksums of the data."""


def write_tensors(
    path: Path, pieces: Iterable[tuple[Piece, torch.Tensor]], stamp: Stamp, checksum_kind: ChecksumKind
) -> File:
    """Write ``pieces`` to a new safetensors file and synchronise it.

    Copies at most `CHUNK` bytes at a time, and nothing if the values are in host memory.

    Args:
        pieces: Pieces with their values, 1-D on any device.
    """
    ordered = sorted(pieces, key=lambda pair: _alignment(pair[0]))
    blank = files.checksum_of(b"", checksum_kind)
    with files.explain_os_errors(path, "cannot write"), path.open("xb", buffering=0) as file:
        header = encode_header([replace(piece, checksum=blank) for piece, _ in ordered], stamp)
        files.write_all(file.fileno(), header)
        summed = [
            replace(piece, checksum=_write_values(file.fileno(), values, files.new_checksum(checksum_kind)))
            for piece, values in ordered
        ]
        header = encode_header(summed, stamp)  # as long as before: the checksums are
        os.pwrite(file.fileno(), header, 0)
        os.fsync(file.fileno())
    size = len(header) + sum(piece.nbytes for piece in summed)
    return File(name=path.name, nbytes=size, header=files.checksum_of(header, checksum_kind))


def _write_values(descriptor: int, values: torch.Tensor, checksum: Checksum) -> str:
    for chunk in values.split(CHUNK // values.element_size()):
        data = memory_of(chunk.cpu())
        checksum.update(data)
        files.write_all(descriptor, data)
    return checksum.hexdigest()


def _alignment(piece: Piece) -> tuple[bool, int]:
    """Sort key that aligns every piece to its element size, and most pieces to a cache line."""
    return piece.nbytes % _CACHE_LINE != 0, -piece.dtype.itemsize


def encode_header(pieces: Sequence[Piece], stamp: Stamp) -> bytes:
    """Return the header of a safetensors file in which ``pieces`` follow one another.

    Its length does not depend on the values of checksums of equal length, so that it can be overwritten in place.
    """
    shapes = {piece.key: [list(piece.shape), piece.checksum] for piece in pieces}
    metadata = json.dumps({"tag": stamp.tag, "nonce": stamp.nonce, "pieces": shapes})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _METADATA: metadata}}
    begin = 0
    for piece in pieces:
        end = begin + piece.nbytes
        header[piece.key] = {"dtype": DTYPES[piece.dtype], "shape": [piece.numel], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _CACHE_LINE)
    return len(text).to_bytes(8, "little") + text


def header_length(head: bytes, file_bytes: int) -> int:
    """Return the bytes of the header, from the first eight bytes of a file. Raise `CheckpointError` if impossible."""
    length = int.from_bytes(head, "little") + 8
    if len(head) < 8 or length > min(file_bytes, _MAX_HEADER):
        raise CheckpointError("its header is longer than the file")
    return length


def decode_header(header: bytes) -> tuple[list[Piece], Stamp]:
    """Return what `encode_header` was given. Raise `CheckpointError` for a header that it never produces."""
    try:
        table = json.loads(header[8:])
        metadata = json.loads(table.pop("__metadata__")[_METADATA])
        pieces = [_piece(key, value, metadata["pieces"][key], len(header)) for key, value in table.items()]
        return pieces, Stamp(tag=metadata["tag"], nonce=metadata["nonce"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"its header is not that of a checkpoint file ({type(error).__name__}: {error})"
        ) from error


def _piece(key: str, value: dict[str, Any], shape_and_checksum: list[Any], start: int) -> Piece:
    entry, _, offset = key.rpartition("@")
    (numel,), (begin, end) = value["shape"], value["data_offsets"]
    piece = Piece(
        entry=entry, dtype=DTYPES_BY_NAME[value["dtype"]], shape=tuple(shape_and_checksum[0]), offset=int(offset),
        numel=numel, checksum=shape_and_checksum[1], position=start + begin,
    )  # fmt: skip
    if end - begin != piece.nbytes or begin < 0 or piece.offset < 0:
        raise ValueError(f"the size of {key} does not match its position")
    return piece


# The manifest


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything in a checkpoint that is not a tensor, and the root of its checksums."""

    stamp: Stamp
    sequence: int
    """Increases by one with each checkpoint of a store."""
    latest: bool
    """Whether loading without a tag may choose this checkpoint."""
    checksum: ChecksumKind
    files: tuple[File, ...]
    """By rank."""
    state: dict[str, Any]
    """JSON values: models, loaders, client state, and where they come from."""

    @property
    def tag(self) -> str:
        """The tag under which it was saved."""
        return self.stamp.tag

    @property
    def lineages(self) -> dict[str, str]:
        """By model, an identifier that stays the same when a restarted run loads the model."""
        return {name: facts["lineage"] for name, facts in self.state["models"].items()}

    @property
    def classes(self) -> dict[str, str]:
        """The class of each model, by name."""
        return {name: facts["class"] for name, facts in self.state["models"].items()}

    @property
    def ranks(self) -> int:
        """Number of ranks that wrote it."""
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.nbytes for file in self.files)

    def to_text(self) -> str:
        """Return the text of the file; its first line has the checksum of the rest."""
        body = json.dumps(
            {
                "version": VERSION, "tag": self.tag, "nonce": self.stamp.nonce, "sequence": self.sequence, "latest": self.latest,
                "checksum": self.checksum, "files": [[file.name, file.nbytes, file.header] for file in self.files],
                "state": self.state,
            },
            allow_nan=False,
        )  # fmt: skip
        return _sealed(body)

    @classmethod
    def from_text(cls, text: str) -> "Manifest":
        """Return the manifest that `to_text` wrote. Raise `CheckpointError` for any other text."""
        body = _unsealed(text)
        version = body.get("version") if isinstance(body, dict) else None
        if version != VERSION:
            raise CheckpointError(
                f"expected version {VERSION} of the format, got {version}. Use the version of lightrft-strategy-base that wrote it"
            )
        try:
            manifest = cls(
                stamp=Stamp(tag=body["tag"], nonce=body["nonce"]), sequence=body["sequence"], latest=body["latest"],
                checksum=body["checksum"], state=_checked(body["state"]),
                files=tuple(File(name=name, nbytes=nbytes, header=header) for name, nbytes, header in body["files"]),
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"it is not a complete manifest ({type(error).__name__}: {error})") from error
        if [file.name for file in manifest.files] != [
            file_name(rank, manifest.ranks) for rank in range(manifest.ranks)
        ]:
            raise CheckpointError("its list of files is not that of a checkpoint")
        return manifest


_MODEL_FACTS = {"class", "lineage", "average", "scheduler", "training"}
"""What every model in a manifest has."""


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` if it is complete. Raise KeyError, TypeError or AttributeError otherwise."""
    missing = {"models", "loaders", "client_state"} - state.keys()
    missing |= {fact for facts in state.get("models", {}).values() for fact in _MODEL_FACTS - facts.keys()}
    if missing:
        raise KeyError(*sorted(missing))
    return state


_OPENING, _MIDDLE, _CLOSING = '{"format":"lightrft-checkpoint","crc32":"', '","manifest":\n', "\n}\n"


def _sealed(body: str) -> str:
    return f"{_OPENING}{files.checksum_of(body.encode(), 'crc32')}{_MIDDLE}{body}{_CLOSING}"


def _unsealed(text: str) -> Any:
    start = len(_OPENING) + 8 + len(_MIDDLE)
    body = text[start : -len(_CLOSING)]
    if text != _sealed(body):
        raise CheckpointError(
            "its contents do not match its checksum: it is damaged, or not the manifest of a checkpoint"
        )
    return json.loads(body)
