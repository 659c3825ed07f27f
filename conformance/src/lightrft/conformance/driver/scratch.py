"""Where programs write: in memory, where there is room, for then synchronising costs nothing.

The driver chooses, tells all ranks by their environment, and removes it in the end.
"""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

VARIABLE = "LIGHTRFT_CONFORMANCE_SCRATCH"
MEMORY = Path("/dev/shm")
ROOM = 2 << 30
"""Bytes that must be free there."""


def choose() -> Path:
    """A path that is not there yet; below TMPDIR where that is set."""
    name = f"lightrft-conformance-{os.getpid()}-{secrets.token_hex(4)}"
    return (MEMORY if "TMPDIR" not in os.environ and _has_room() else Path(tempfile.gettempdir())) / name


def _has_room() -> bool:
    try:
        return os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM
    except OSError:
        return False


def scratch(what: str) -> Path:
    """In a worker: the place for files of one kind, which may not be there yet."""
    return Path(os.environ[VARIABLE]) / what
