"""Temporary directories of an engine."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path


class OwnFolder:
    """A temporary directory that goes with this object, or with the process that made it; a fork leaves it alone.

    `tempfile.TemporaryDirectory` is also removed where a fork ends, which may be long before the engine does. A process
    that is killed removes nothing: what it left is removed when the next is made, by its lock, which nobody holds then.
    """

    def __init__(self, engine: str) -> None:
        prefix = f"lightrft-engine-{engine}-"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove_if_left(left)
        new = tempfile.mkdtemp(prefix="lightrft-new-")
        lock = _locked(new)
        self.path = str(Path(new).with_name(Path(new).name.replace("lightrft-new-", prefix)))
        os.rename(new, self.path)
        self.remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())


def _locked(path: str) -> int:
    """A descriptor of a directory, which is locked as long as it is open, where the file system has locks."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_if_left(path: Path) -> None:
    with contextlib.suppress(OSError):  # another's, in use, or gone meanwhile
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
