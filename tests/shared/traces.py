"""What a lifetime of a strategy might leave in its process."""

import os
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist


def traces() -> dict[str, Any]:
    """What is there now, to be compared with what is there later."""
    return {
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "system threads": len(list(Path("/proc/self/task").iterdir())),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "process group": dist.is_initialized(),
    }
