"""Temporary directories of an engine."""

import contextlib
import os
import secrets
import shutil
import tempfile
import weakref
from pathlib import Path

from lightrft.strategy.storage.locks import Lock, holding


class TemporaryDirectory:
    """A directory that is removed with this object, or when the process that created it ends, but not by its forks.

    `tempfile.TemporaryDirectory` is also removed when a fork ends, which may be long before the engine does. A killed
    process leaves its directory behind; the next engine removes it, because its lock is free.
    """

    def __init__(self, engine: str) -> None:
        """Make a directory whose name contains ``engine``."""
        folder, prefix = Path(tempfile.gettempdir()), f"lightrft-engine-{engine}-"
        path = folder / f"{prefix}{secrets.token_hex(4)}"
        lock = Lock(folder, path.name)
        lock.acquire()
        path.mkdir(mode=0o700)
        with holding(folder, path.name) as lockless:  # a file system without locks: all directories may be in use
            for left in () if lockless else folder.glob(f"{prefix}*"):
                _remove_if_unlocked(left)
        self.path = str(path)
        self.remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())


def _remove_if_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError), holding(path.parent, path.name) as acquired:  # it may belong to another user
        if acquired:
            shutil.rmtree(path)


def _remove(path: str, lock: Lock, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()
