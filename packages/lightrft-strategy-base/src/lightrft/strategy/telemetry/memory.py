"""Measuring the memory of this process."""

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Memory in bytes at one moment. Device figures are 0 on the CPU."""

    host: int
    """Resident memory of this process."""
    host_peak: int
    """Peak of the resident memory."""
    device: int
    """Allocated by torch on the device."""
    device_reserved: int
    """Held by torch's caching allocator on the device."""
    device_used: int
    """Used on the device by all processes together."""

    def __str__(self) -> str:
        host = f"host {self.host / GIB:.2f} GiB (peak {self.host_peak / GIB:.2f})"
        if not self.device_used:
            return host
        return (
            f"{host}, device {self.device / GIB:.2f} GiB allocated, {self.device_reserved / GIB:.2f} reserved, "
            f"{self.device_used / GIB:.2f} used"
        )


def measure(device: torch.device) -> MemoryReport:
    """Measure this process, and ``device`` if it is a CUDA device."""
    cuda = device.type == "cuda"
    free, total = torch.cuda.mem_get_info(device) if cuda else (0, 0)
    return MemoryReport(
        host=_resident(),
        host_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        device=torch.cuda.memory_allocated(device) if cuda else 0,
        device_reserved=torch.cuda.memory_reserved(device) if cuda else 0,
        device_used=total - free,
    )


def _resident() -> int:
    """Return the resident memory in bytes, from Linux's /proc; on other systems, its peak."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
