"""Current and peak memory of this process: on the GPU as counted by torch, otherwise by the kernel.

The kernel's count excludes file pages, such as libraries, which are loaded as code is first used.
"""

import ctypes
import gc
from pathlib import Path

import torch


def begin(device: torch.device) -> int:
    """Reset the peak; returns the bytes in use now."""
    gc.collect()
    _return_freed_blocks()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    return _resident("RssAnon") + _resident("RssShmem")


def _return_freed_blocks() -> None:
    """Make glibc return freed blocks of 1 MiB and more to the kernel at once.

    By default it adapts this threshold, up to 32 MiB, to the blocks that were freed.
    """
    m_mmap_threshold = -3
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(m_mmap_threshold, 2**20)


def peak(device: torch.device) -> int:
    """The peak since `begin`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") - _resident("RssFile")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
