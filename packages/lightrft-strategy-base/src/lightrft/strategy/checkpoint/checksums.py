"""Checksums: crc32, which finds what goes wrong by itself, or sha256, which also finds what is done on purpose."""

import hashlib
from typing import Literal, Protocol

from lightrft.config import CheckpointError

try:
    from isal.isal_zlib import crc32
except ImportError:  # not made for this processor; zlib's is the same, and several times slower
    from zlib import crc32

Kind = Literal["crc32", "sha256"]
Buffer = bytes | bytearray | memoryview


class Checksum(Protocol):
    """A checksum in the making."""

    def update(self, data: Buffer, /) -> None:
        """Take ``data`` in."""

    def hexdigest(self) -> str:
        """The checksum of all that was taken in: as many digits for any data."""


class Crc32:
    """CRC-32 as in zlib."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Buffer, /) -> None:
        """Take ``data`` in."""
        self._value = crc32(data, self._value)

    def hexdigest(self) -> str:
        """Eight digits."""
        return f"{self._value:08x}"


def begin(kind: str) -> Checksum:
    """A checksum of nothing yet."""
    if kind == "crc32":
        return Crc32()
    if kind == "sha256":
        return hashlib.sha256()
    raise CheckpointError(f"unknown kind of checksum, {kind!r}; the checkpoint was written by a later version")


def of(data: Buffer, kind: str) -> str:
    """The checksum of ``data``."""
    checksum = begin(kind)
    checksum.update(data)
    return checksum.hexdigest()
