"""The environment variables that DeepSpeed reads, some of them during import. Does not load DeepSpeed."""

import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy.backend import World, local_rank


def prepare_environment(config: StrategyConfig, world: World) -> None:
    """Tell DeepSpeed the device of this process, its local rank, and where to build operators.

    Raises:
        ConfigError: ``DS_ACCELERATOR`` names another device than the setting.
    """
    accelerator, device = os.environ.get("DS_ACCELERATOR"), world.device.type
    if accelerator is not None and accelerator != device:
        raise ConfigError(
            f"strategy 'deepspeed' expected DS_ACCELERATOR={device!r}, its device, or no such variable, got "
            f"DS_ACCELERATOR={accelerator!r} in the environment. Unset it, or set device={accelerator!r}"
        )
    os.environ["DS_ACCELERATOR"] = device
    os.environ["LOCAL_RANK"] = str(local_rank(config))
    # Without it DeepSpeed runs numactl to count CPU "devices", at stage 3 for each bucket of gradients:
    # https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/accelerator/cpu_accelerator.py#L71
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))
    # torch caches operators by name alone, so DeepSpeed versions that share a cache break each other.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir()))


def extensions_dir() -> Path:
    """Return where the operators of this environment are built: in the user's cache, by version and environment."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    prefix = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    name = f"deepspeed-{version('deepspeed')}-torch-{version('torch')}-{python}-{prefix}"
    return cache / "lightrft" / "torch_extensions" / name
