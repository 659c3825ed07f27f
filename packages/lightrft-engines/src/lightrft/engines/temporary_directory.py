"""Temporary directories of an engine."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path


class TemporaryDirectory:
    """A directory that is removed with this object, or when the process that created it ends, but not by its forks.

    `tempfile.TemporaryDirectory` is also removed when a fork ends, which may be long before the engine does. A killed
    process leaves its directory behind; the next engine removes it, because its lock is free.
    """

    def __init__(self, engine: str) -> None:
        """Make a directory whose name contains ``engine``."""
        prefix = f"lightrft-engine-{engine}-"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove_if_unlocked(left)
        new = tempfile.mkdtemp(prefix="lightrft-new-")
        lock = _locked(new)
        self.path = str(Path(new).with_name(Path(new).name.replace("lightrft-new-", prefix)))
        os.rename(new, self.path)
        self.remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())


def _locked(path: str) -> int:
    """Lock a directory, if the file system has locks. Returns the descriptor that holds the lock while it is open."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_if_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError):  # it belongs to another user, is in use, or was removed meanwhile
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        finally:
            os.close(descriptor)


def _remove(path: str, lock: int, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
