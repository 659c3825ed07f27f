"""The format: what a checkpoint is on disk.

    SAVE_DIR/
      latest                             the tag of the newest checkpoint, for people and tools
      TAG/
        manifest.json                    what there is, and the checksums of the files' headers
        rank-00000-of-00002.safetensors  what rank 0 of 2 wrote; its header has the checksums of its tensors

Manifest and files say of which save they are: they have its tag and its nonce, and none takes the place of another's.

An entry is one tensor of the state, under a name such as ``model/parameters/layers.0.weight``. Ranks write
pieces of it: ranges of the flattened tensor. In a file a piece is a 1-D tensor under ENTRY@OFFSET, and the
header's metadata has the shape of the whole. Reading needs no pickle, and no code but this package's.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint import checksums

VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
_METADATA = "lightrft"
_LONGEST_HEADER = 2**30
_LINE = 64
"""Bytes of a processor's line of cache: torch's memory begins at a multiple of it. To there from such a place, and back,
the system copies in half the time."""

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names of types."""
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def file_name(rank: int, ranks: int) -> str:
    """The file that ``rank`` of ``ranks`` writes."""
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A range of one entry, in one file."""

    entry: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole entry."""
    offset: int
    """Of the first element in the flattened whole."""
    numel: int
    checksum: str = ""
    position: int = 0
    """Of the first byte in the file."""

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.entry}@{self.offset}"

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What the manifest and the files of one save, and of no other, have in common."""

    tag: str
    nonce: str


def place(piece: Piece) -> tuple[bool, int]:
    """To sort pieces by, so that all begin at a multiple of their element's size, and most at one of `_LINE`."""
    return piece.nbytes % _LINE != 0, -piece.dtype.itemsize


def encode_header(pieces: Sequence[Piece], stamp: Stamp) -> bytes:
    """The head of a safetensors file in which ``pieces`` follow one another.

    Its length does not depend on the checksums, if these are equally long: it may be written again with others.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            _METADATA: json.dumps(
                {
                    "tag": stamp.tag,
                    "nonce": stamp.nonce,
                    "pieces": {piece.key: [list(piece.shape), piece.checksum] for piece in pieces},
                }
            ),
        }
    }
    begin = 0
    for piece in pieces:
        end = begin + piece.nbytes
        header[piece.key] = {"dtype": DTYPES[piece.dtype], "shape": [piece.numel], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _LINE)
    return len(text).to_bytes(8, "little") + text


def header_length(head: bytes, file_bytes: int) -> int:
    """Bytes of the header, from the first eight of a file. Raises `CheckpointError` where that cannot be."""
    length = int.from_bytes(head, "little") + 8
    if len(head) < 8 or length > min(file_bytes, _LONGEST_HEADER):
        raise CheckpointError("its header is longer than the file")
    return length


def decode_header(header: bytes) -> tuple[list[Piece], Stamp]:
    """What `encode_header` was given. Raises `CheckpointError` for a header that it never makes."""
    try:
        table = json.loads(header[8:])
        metadata = json.loads(table.pop("__metadata__")[_METADATA])
        whole = metadata["pieces"]
        pieces = [_piece(key, value, whole[key], len(header)) for key, value in table.items()]
        return pieces, Stamp(tag=metadata["tag"], nonce=metadata["nonce"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its header is not one of a checkpoint ({type(error).__name__}: {error})") from error


def _piece(key: str, value: dict[str, Any], whole: list[Any], start: int) -> Piece:
    entry, _, offset = key.rpartition("@")
    (numel,), (begin, end) = value["shape"], value["data_offsets"]
    piece = Piece(
        entry=entry, dtype=_BY_NAME[value["dtype"]], shape=tuple(whole[0]), offset=int(offset), numel=numel,
        checksum=whole[1], position=start + begin,
    )  # fmt: skip
    if end - begin != piece.nbytes or begin < 0 or piece.offset < 0:
        raise ValueError(f"{key} does not fit its place")
    return piece


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a checkpoint."""

    name: str
    nbytes: int
    header: str
    """Checksum of the header, in which those of the data are."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint has beside tensors, and the root of its checksums."""

    stamp: Stamp
    sequence: int
    """Rises by one with each checkpoint of a store."""
    latest: bool
    """Whether loading without a tag may find it."""
    checksum: checksums.Kind
    files: tuple[File, ...]
    """By rank."""
    state: dict[str, Any]
    """JSON values: models, loaders, client state, and where they come from."""

    @property
    def tag(self) -> str:
        """Under which it was saved."""
        return self.stamp.tag

    @property
    def lineages(self) -> dict[str, str]:
        """By model, the name that it keeps from one checkpoint to the next, over restarts that load them."""
        return {name: facts["lineage"] for name, facts in self.state["models"].items()}

    @property
    def ranks(self) -> int:
        """The ranks that wrote it."""
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.nbytes for file in self.files)

    def to_text(self) -> str:
        """As it is written: the first line has the checksum of all the rest."""
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
        """Raises `CheckpointError` for anything but what `to_text` gives."""
        body = _unsealed(text)
        version = body.get("version") if isinstance(body, dict) else None
        if version != VERSION:
            raise CheckpointError(
                f"it is of version {version} of the format, and this LightRFT reads version {VERSION}"
            )
        try:
            manifest = cls(
                stamp=Stamp(tag=body["tag"], nonce=body["nonce"]), sequence=body["sequence"], latest=body["latest"], checksum=body["checksum"],
                files=tuple(File(name=name, nbytes=nbytes, header=header) for name, nbytes, header in body["files"]),
                state=_checked(body["state"]),
            )  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"it lacks what a manifest has ({type(error).__name__}: {error})") from error
        if [file.name for file in manifest.files] != [file_name(it, manifest.ranks) for it in range(manifest.ranks)]:
            raise CheckpointError("it names files that no checkpoint has")
        return manifest


_FACTS = {"class", "lineage", "average", "scheduler", "training"}
"""What is known of every model."""


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """``state``, if it has what loading asks of it. Raises KeyError, TypeError or AttributeError."""
    lacking = {"models", "loaders", "client_state"} - state.keys()
    lacking |= {it for facts in state.get("models", {}).values() for it in _FACTS - facts.keys()}
    if lacking:
        raise KeyError(*sorted(lacking))
    return state


_OPENING, _MIDDLE, _CLOSING = '{"format":"lightrft-checkpoint","crc32":"', '","manifest":\n', "\n}\n"


def _sealed(body: str) -> str:
    return f"{_OPENING}{checksums.of(body.encode(), 'crc32')}{_MIDDLE}{body}{_CLOSING}"


def _unsealed(text: str) -> Any:
    start = len(_OPENING) + 8 + len(_MIDDLE)
    body = text[start : -len(_CLOSING)]
    if text != _sealed(body):
        raise CheckpointError("its checksum does not fit its contents: it is damaged, or no manifest of a checkpoint")
    return json.loads(body)


def by_entry(pieces: Iterable[tuple[int, Piece]]) -> dict[str, list[tuple[int, Piece]]]:
    """Pieces, with the index of their file, by entry, in the order of their offsets."""
    found: dict[str, list[tuple[int, Piece]]] = {}
    for index, piece in pieces:
        found.setdefault(piece.entry, []).append((index, piece))
    for group in found.values():
        group.sort(key=lambda it: (it[1].offset, it[1].numel))
    return found
