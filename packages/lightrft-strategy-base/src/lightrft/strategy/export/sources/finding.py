"""Which kind of directory a path is."""

from pathlib import Path

from lightrft.config import CheckpointError, CheckpointNotFoundError
from lightrft.strategy.checkpoint.layout import LATEST, MANIFEST
from lightrft.strategy.export.sources import dcp, deepspeed, safetensors, torch_files
from lightrft.strategy.export.sources.source import Source

ADAPTERS = "adapter_config.json"


def open_source(place: Path, *, allow_pickle: bool = False) -> Source:
    """The weights at ``place``. Raises `CheckpointNotFoundError` where there are none of a kind that is known."""
    if not place.is_dir():
        raise CheckpointNotFoundError(f"there is no directory {place}")
    if has_adapters(place):
        return safetensors.SafetensorsSource(place, "adapter_model")
    if safetensors.is_here(place, "model"):
        return safetensors.SafetensorsSource(place, "model")
    if (place / dcp.METADATA).exists():
        return dcp.DcpSource(place)
    if deepspeed.is_here(place):
        return deepspeed.DeepspeedSource(place, allow_pickle=allow_pickle)
    if torch_files.is_here(place):
        return torch_files.TorchFileSource(place, allow_pickle=allow_pickle)
    return _below(place, allow_pickle)


def has_adapters(place: Path) -> bool:
    """Whether ``place`` is a directory of PEFT adapters."""
    return (place / ADAPTERS).exists()


def _below(place: Path, allow_pickle: bool) -> Source:
    """DeepSpeed's directory of several checkpoints names the newest one."""
    if (place / MANIFEST).exists():
        raise CheckpointError(
            f"{place} is a checkpoint of a training run; load_ckpt reads it, and 'lightrft convert' makes a model of it"
        )
    latest = place / LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if "/" not in tag and (place / tag).is_dir():
            return open_source(place / tag, allow_pickle=allow_pickle)
    inside = sorted(it.name for it in place.iterdir() if it.is_dir())
    raise CheckpointNotFoundError(
        f"{place} holds no weights that are known: model.safetensors (or its index), adapter_model.safetensors, the files "
        f"of torch.distributed.checkpoint or of DeepSpeed, {torch_files.WEIGHTS} (or its index); directories in it: "
        f"{', '.join(inside) or 'none'}"
    )
