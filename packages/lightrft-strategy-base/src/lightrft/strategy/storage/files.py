"""Durable files: written, synchronised with the disk, renamed into place; and checksums of what is written.

An `OSError` becomes a `CheckpointError` with the path and the remedy.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from lightrft.config import ArgumentError, CheckpointError
from lightrft.config.validation import path_fault, shown

try:
    from isal.isal_zlib import crc32
except ImportError:  # not built for this processor; zlib's gives the same values and is several times slower
    from zlib import crc32

ChecksumKind = Literal["crc32", "sha256"]
"""crc32 detects accidental damage; sha256 detects tampering too."""
Buffer = bytes | bytearray | memoryview
_OTHER_DIRECTORY = "free space there, or use another directory"
_PERMISSION = "grant this user permission, or use another directory"
_REMEDIES = {
    errno.ENOSPC: _OTHER_DIRECTORY,
    errno.EDQUOT: _OTHER_DIRECTORY,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EEXIST: "remove it, or use another tag or directory",
    errno.ENAMETOOLONG: "use a shorter tag",
    errno.ENOENT: "another process removed it: stop that process",
}


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """Return the argument ``name`` as an absolute path, in which ``~`` is the home directory. Raise `ArgumentError`.

    An empty path is refused: it would be the working directory, where a script's variable was not set.
    """
    text = os.fspath(path)
    if not text:
        raise ArgumentError(f"expected {name} to be a path, got {shown(text)}. For the working directory, pass '.'")
    ordinary = isinstance(text, str) and len(text) <= 255 and text.isascii() and text.isprintable()
    if not ordinary and (fault := path_fault(text)):
        raise ArgumentError(f"expected {name} to be a path, got {shown(text)}, {fault}")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ArgumentError(
            f"expected {name} in a home directory that exists, got {text!r}: {error} Pass an absolute path"
        ) from error


@contextmanager
def explain_os_errors(path: Path, failure: str) -> Iterator[None]:
    """Convert an `OSError` of the body to a `CheckpointError` with what failed, the path and the remedy.

    Args:
        path: The path to name if the `OSError` names none.
        failure: The beginning of the message, such as "cannot write".
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = _REMEDIES.get(error.errno or 0, "check the file system, or use another directory")
        raise CheckpointError(
            f"{failure} {error.filename or path}: {reason} ({type(error).__name__}); {remedy}"
        ) from error


def write_all(descriptor: int, data: Buffer) -> None:
    """Write all of ``data``, in as many calls as the system needs."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_text(path: Path, text: str) -> None:
    """Write a new file and synchronise it."""
    with explain_os_errors(path, "cannot write"), path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    write_text(temporary, text)
    rename(temporary, path)


def rename(source: Path, target: Path) -> None:
    """Rename within a directory, durably."""
    with explain_os_errors(source, "cannot rename"):
        source.rename(target)
        synchronise(target.parent)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, durably."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        synchronise(made.parent)


def synchronise_all(directory: Path) -> None:
    """Synchronise everything below ``directory``."""
    for folder, _, names in os.walk(directory):
        for path in (Path(folder), *(Path(folder, name) for name in names)):
            synchronise(path)


def synchronise(path: Path) -> None:
    """Make the contents of a file, or the names in a directory, survive a crash of the host."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checksum(Protocol):
    """A checksum being computed."""

    def update(self, data: Buffer, /) -> None:
        """Add ``data``."""

    def hexdigest(self) -> str:
        """Return the checksum of everything added, always with the same number of digits."""


class Crc32:
    """CRC-32 as in zlib."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Buffer, /) -> None:
        """Add ``data``."""
        self._value = crc32(data, self._value)

    def hexdigest(self) -> str:
        """Return eight digits."""
        return f"{self._value:08x}"


def new_checksum(algorithm: str) -> Checksum:
    """Return a new checksum; ``algorithm`` is "crc32" or "sha256"."""
    if algorithm == "crc32":
        return Crc32()
    if algorithm == "sha256":
        return hashlib.sha256()
    raise CheckpointError(
        f"expected the checksum crc32 or sha256, got {algorithm!r}. A later version wrote the checkpoint: upgrade "
        f"lightrft-strategy-base"
    )


def checksum_of(data: Buffer, algorithm: str) -> str:
    """Return the checksum of ``data``."""
    checksum = new_checksum(algorithm)
    checksum.update(data)
    return checksum.hexdigest()
