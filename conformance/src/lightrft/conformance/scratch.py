"""Where programs write: a directory in memory if there is room, because fsync costs nothing there.

The driver chooses the directory, passes it to all ranks in their environment, and removes it at the end.
"""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

VARIABLE = "LIGHTRFT_CONFORMANCE_SCRATCH"
MEMORY = Path("/dev/shm")
ROOM = 2 << 30
"""Bytes that must be free there to use it."""


def choose() -> Path:
    """A new path, not yet created; below TMPDIR if that is set."""
    name = f"lightrft-conformance-{os.getpid()}-{secrets.token_hex(4)}"
    return (MEMORY if "TMPDIR" not in os.environ and _has_room() else Path(tempfile.gettempdir())) / name


def _has_room() -> bool:
    try:
        return os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM
    except OSError:
        return False


def scratch(what: str) -> Path:
    """In a worker: the directory for one purpose, which may not exist yet."""
    return Path(os.environ[VARIABLE]) / what
