"""One writer at a time: a lock that ends with the process that holds it, however that ends.

It is an ``flock`` of an empty file beside what is written. Writers on one host see each other's everywhere; writers on
several hosts where the file system carries locks between hosts, as NFS with its lock manager and Lustre mounted with
``flock`` do. Where it does not, or has no locks at all, the lock keeps nobody out: one run at a time may write there.
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
    """The right to write, and to clean up, what is called ``name`` in ``directory``."""

    def __init__(self, directory: Path, name: str) -> None:
        self.path = directory / f".{name}.{SUFFIX}"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._descriptor is not None

    def take(self, patience: float = 0.0) -> bool:
        """Whether it could be had, for which this waits ``patience`` seconds."""
        deadline = time.monotonic() + patience
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
        """Let others have it, and leave no file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                self.path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


@contextmanager
def holding(directory: Path, name: str, patience: float = 0.0) -> Iterator[bool]:
    """Hold a lock in the body, which is told whether it could be had within ``patience`` seconds."""
    lock = Lock(directory, name)
    try:
        yield lock.take(patience)
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
    """Whether the open file is still the one at ``path``: who held it may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
