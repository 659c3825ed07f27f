"""What `lightrft doctor` checks of the machine: devices, compiler and operator caches, network, memory."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lightrft_cli.imports import TIMEOUT
from lightrft_cli.output import size
from lightrft_cli.requirements import installed_version

Level = Literal["ok", "warning", "problem"]
SMALL_SHM = 2**30
"""Free bytes of /dev/shm below which engines and loader workers may run out of it."""
STALE_LOCK = 3600
"""Age in seconds above which the lock of an operator build is reported, since its process was probably killed."""
_TORCH = """
import json, torch, torch.distributed as dist
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
devices = [torch.cuda.get_device_properties(index) for index in range(count)]
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
    "devices": [[device.name, device.total_memory] for device in devices],
}))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    topic: str
    name: str
    level: Level
    detail: str
    remedy: str = ""


def devices() -> Iterator[Finding]:
    """Yield the devices that torch finds, in a separate process."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=TIMEOUT, check=True
        )
        torch = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        yield Finding("devices", "torch", "problem", f"cannot be imported: {lines[-1]}", "pip install 'torch>=2.11'")
        return
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
    backends = ", ".join(name for name in ("gloo", "nccl") if torch[name]) or "none"
    yield Finding("devices", "torch", "ok", f"{torch['version']}, {build}, process groups: {backends}")
    yield Finding("devices", "cpu", "ok", f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}")
    for index, (name, memory) in enumerate(torch["devices"]):
        yield Finding("devices", f"cuda:{index}", "ok", f"{name}, {size(memory)}")
    if not torch["devices"]:
        yield _no_gpu(torch["cuda"])


def _no_gpu(cuda: str | None) -> Finding:
    if not Path("/dev/nvidia0").exists():
        return Finding("devices", "cuda", "ok", "no NVIDIA GPU: models train on the CPU")
    if cuda is None:
        remedy = "install a CUDA build: https://pytorch.org/get-started/locally"
        return Finding(
            "devices", "cuda", "problem", "expected a CUDA build of torch for the GPU, got a CPU build", remedy
        )
    remedy = "compare the driver's version in nvidia-smi with torch's CUDA, and unset CUDA_VISIBLE_DEVICES"
    return Finding("devices", "cuda", "problem", f"torch for CUDA {cuda} cannot use the GPU", remedy)


def operators() -> Iterator[Finding]:
    """Yield whether DeepSpeed's operators can be built, if it is installed: `adam_offload` needs one."""
    if not installed_version("deepspeed") or not installed_version("lightrft-deepspeed"):
        return
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    yield (
        Finding("operators", "compiler", "ok", compiler)
        if compiler
        else Finding(
            "operators", "compiler", "warning", "no C++ compiler: adam_offload=True fails", "apt-get install g++"
        )
    )
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    yield (
        Finding("operators", "ninja", "ok", ninja)
        if ninja
        else Finding("operators", "ninja", "warning", "no ninja: adam_offload=True fails", "pip install ninja")
    )
    yield from _operator_cache()


def _operator_cache() -> Iterator[Finding]:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightrft"
    name = "TORCH_EXTENSIONS_DIR" if given else "cache"
    existing = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    if not _is_writable(existing):
        remedy = "export TORCH_EXTENSIONS_DIR=DIRECTORY, one that this user can write"
        yield Finding("operators", name, "problem", f"expected write access to {existing}, got none", remedy)
        return
    built = sorted(library.stem for library in cache.rglob("*.so"))
    yield Finding("operators", name, "ok", f"{cache}, built: {', '.join(built) or 'none'}")
    for lock in cache.rglob("lock"):
        try:
            hours = (time.time() - lock.stat().st_mtime) / 3600
        except FileNotFoundError:  # the build has ended
            continue
        if hours * 3600 > STALE_LOCK:
            detail = f"{lock} is {hours:.0f} h old: torch waits for it forever if its build was killed"
            yield Finding("operators", "lock", "warning", detail, f"rm {lock}")


def _is_writable(directory: Path) -> bool:
    """Try to write: permission bits do not tell for a read-only file system, or for root."""
    try:
        with tempfile.TemporaryDirectory(dir=directory):
            return True
    except OSError:
        return False


def network() -> Iterator[Finding]:
    """Yield whether ranks on this machine can connect: a free port on loopback, and the host name."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
        yield Finding("network", "loopback", "ok", f"port {port} is free and accepts connections")
    except OSError as error:
        remedy = "ip link set lo up, or allow connections to 127.0.0.1"
        yield Finding("network", "loopback", "problem", f"expected to connect to 127.0.0.1, got: {error}", remedy)
    host = socket.gethostname()
    try:
        yield Finding("network", "host name", "ok", f"{host} is {socket.gethostbyname(host)}")
    except OSError as error:
        remedy = f"add '127.0.0.1 {host}' to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo"
        yield Finding("network", "host name", "warning", f"{host} does not resolve ({error}): gloo may fail", remedy)


def memory() -> Iterator[Finding]:
    """Yield host memory, with the limit of a container, and shared memory."""
    available, total = _host_memory()
    yield Finding("memory", "host", "ok", f"{size(available)} available of {size(total)}")
    shm = Path("/dev/shm")
    if not _is_writable(shm):
        remedy = "mount -t tmpfs tmpfs /dev/shm, or in a container: docker run --shm-size=8g"
        yield Finding(
            "memory", "/dev/shm", "problem", "expected a directory that this user can write, got none", remedy
        )
        return
    usage = shutil.disk_usage(shm)
    small = usage.free < SMALL_SHM
    detail = f"{size(usage.free)} free of {size(usage.total)}" + (
        ": engines and loader workers may run out" if small else ""
    )
    remedy = "docker run --shm-size=8g, or free files in /dev/shm" if small else ""
    yield Finding("memory", "/dev/shm", "warning" if small else "ok", detail, remedy)


def _host_memory() -> tuple[int, int]:
    """Return available and total bytes, at most the limit of the control group."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines}
    available, total = kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    limit, used = _number(Path("/sys/fs/cgroup/memory.max")), _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and limit < total:
        total, available = limit, min(available, limit - (used or 0))
    return available, total


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group, or "max"
        return None


def python() -> Iterator[Finding]:
    """Yield the interpreter, and whether there is an installer for the remedies."""
    yield Finding("packages", "python", "ok", f"{platform.python_version()} at {sys.executable}")
    if find_spec("pip") is None and shutil.which("uv") is None:
        yield Finding("packages", "pip", "warning", "neither pip nor uv: the remedies need one", "python -m ensurepip")
