"""What a lifetime of a strategy might leave in its process."""

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist


def traces() -> dict[str, Any]:
    """A snapshot, to be compared with a later one."""
    return {
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "system threads": sorted(_name(task) for task in Path("/proc/self/task").iterdir()),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "process group": dist.is_initialized(),
    }


def added(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is in ``after`` and not in ``before``: more threads or files, and every other value that differs.

    A thread of an earlier strategy may end late, so a smaller number is accepted too.
    """
    differing: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, list):
            value = list((Counter(value) - Counter(before[name])).elements())
        elif name in ("threads", "files"):
            value = max(0, value - before[name])
        elif value == before[name]:
            continue
        if value:
            differing[name] = value
    return differing


def _name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text().strip()
    except OSError:  # it ended meanwhile
        return "ended"
