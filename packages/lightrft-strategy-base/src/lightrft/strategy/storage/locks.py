"""Locks between processes, released by the system when the process that holds one ends.

A lock is an ``flock`` on an empty file next to the path that it protects. It always excludes processes on the same host.
It excludes processes on other hosts if the file system shares locks, as NFS with its lock manager and Lustre mounted
with ``flock`` do. On other file systems the lock excludes no other process, and only one run at a time may write there.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUFFIX = "lightrft-lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """The right to write and to clean up ``name`` in ``directory``."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f".{name}.{SUFFIX}"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self, timeout: float = 0.0) -> bool:
        """Try to acquire the lock for ``timeout`` seconds; return whether this object holds it."""
        deadline = time.monotonic() + timeout
        while not self.held:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if _lock(descriptor) and _is_at(descriptor, self.path):
                self._descriptor = descriptor
                break
            os.close(descriptor)
            if time.monotonic() >= deadline:
                break
            time.sleep(0.02)
        return self.held

    def release(self) -> None:
        """Release the lock and remove its file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                self.path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


@contextmanager
def holding(directory: Path, name: str, timeout: float = 0.0) -> Iterator[bool]:
    """Hold the lock in the body; yield whether it was acquired within ``timeout`` seconds."""
    lock = Lock(directory, name)
    try:
        yield lock.acquire(timeout)
    finally:
        lock.release()


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether the open file is still the one at ``path``: the last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
