"""Temporary directories of an engine."""

import os
import shutil
import tempfile
import weakref


class OwnFolder:
    """A temporary directory that goes with this object, or with the process that made it; a fork leaves it alone.

    `tempfile.TemporaryDirectory` is also removed where a fork ends, which may be long before the engine does.
    """

    def __init__(self, engine: str) -> None:
        self.path = tempfile.mkdtemp(prefix=f"lightrft-{engine}-")
        self.remove = weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
