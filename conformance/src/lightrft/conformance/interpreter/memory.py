"""What this process holds, and held at most: on the GPU by torch's own count, else by the kernel's."""

import gc
from pathlib import Path

import torch


def begin(device: torch.device) -> int:
    """Begin to watch for a peak; returns the bytes that are held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    return _resident("VmRSS")


def peak(device: torch.device) -> int:
    """The most that was held since `begin`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
