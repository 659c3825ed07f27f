"""The environment variables that DeepSpeed reads, some of them while it is imported. Loads no DeepSpeed itself."""

import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy.distributed.world import World, local_rank


def prepare_environment(config: StrategyConfig, world: World) -> None:
    """Tell DeepSpeed this process's device, its place on the host, and where to build operators."""
    asked, device = os.environ.get("DS_ACCELERATOR"), world.device.type
    if asked is not None and asked != device:
        raise ConfigError(
            f"DS_ACCELERATOR={asked!r} in the environment, and this strategy's device is {device!r}; unset the one, or "
            f"set device={asked!r}"
        )
    os.environ["DS_ACCELERATOR"] = device
    os.environ["LOCAL_RANK"] = str(local_rank(config))
    # Without it DeepSpeed starts numactl, in stage 3 for each bucket of gradients, to count CPU "devices".
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))
    # torch caches operators by name alone, and DeepSpeed versions that share the cache break each other.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_dir()))


def extensions_dir() -> Path:
    """Where this environment's operators are built: in the user's cache, by version and by environment. Not made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    prefix = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    name = f"deepspeed-{version('deepspeed')}-torch-{version('torch')}-{python}-{prefix}"
    return cache / "lightrft" / "torch_extensions" / name
