"""What this process holds, and held at most: on the GPU by torch's own count, else by the kernel's.

By the kernel's count pages of files, such as libraries, are left out: they come as code is first used.
"""

import ctypes
import gc
from pathlib import Path

import torch


def begin(device: torch.device) -> int:
    """Begin to watch for a peak; returns the bytes that are held now."""
    gc.collect()
    _give_back_at_once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    return _resident("RssAnon") + _resident("RssShmem")


def _give_back_at_once() -> None:
    """Have glibc take blocks of a megabyte and more from the kernel, and give them back when they are freed.

    It would keep them, up to 32 MiB each, once it has seen some of that size freed.
    """
    m_mmap_threshold = -3
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(m_mmap_threshold, 2**20)


def peak(device: torch.device) -> int:
    """The most that was held since `begin`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") - _resident("RssFile")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
