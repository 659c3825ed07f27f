"""Opens a directory of weights in any known format."""

from pathlib import Path

from lightrft.config import CheckpointError, CheckpointNotFoundError
from lightrft.strategy.checkpoint.format import LATEST, MANIFEST
from lightrft.strategy.export.sources import dcp_checkpoint, deepspeed_checkpoint, safetensors_files, torch_files
from lightrft.strategy.export.sources.source import Source

ADAPTERS = "adapter_config.json"


def open_source(path: Path, *, allow_pickle: bool = False) -> Source:
    """Return the weights at ``path``. Raise `CheckpointNotFoundError` if there are none in a known format."""
    if not path.is_dir():
        raise CheckpointNotFoundError(
            f"expected a local directory of weights at {path}, found none. Check the path; nothing is downloaded: for a "
            f"model on the Hub, pass what huggingface_hub.snapshot_download returns"
        )
    if has_adapters(path):
        return safetensors_files.SafetensorsSource(path, "adapter_model")
    if safetensors_files.found_in(path, "model"):
        return safetensors_files.SafetensorsSource(path, "model")
    if (path / dcp_checkpoint.METADATA).exists():
        return dcp_checkpoint.DcpSource(path)
    if deepspeed_checkpoint.found_in(path):
        return deepspeed_checkpoint.DeepspeedSource(path, allow_pickle=allow_pickle)
    if torch_files.found_in(path):
        return torch_files.TorchFileSource(path, allow_pickle=allow_pickle)
    return _open_below(path, allow_pickle)


def has_adapters(path: Path) -> bool:
    """Return whether ``path`` is a directory of PEFT adapters."""
    return (path / ADAPTERS).exists()


def _open_below(path: Path, allow_pickle: bool) -> Source:
    """Open the newest of several checkpoints that DeepSpeed wrote to subdirectories of ``path``."""
    if (path / MANIFEST).exists():
        raise CheckpointError(
            f"expected a directory of weights, got {path}, a checkpoint of a training run. Load it with load_ckpt, or convert "
            f"it with 'lightrft convert'"
        )
    latest = path / LATEST
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        if "/" not in tag and (path / tag).is_dir():
            return open_source(path / tag, allow_pickle=allow_pickle)
    directories = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    raise CheckpointNotFoundError(
        f"expected weights in {path}, found none: no model.safetensors (or its index), adapter_model.safetensors, files of "
        f"torch.distributed.checkpoint or of DeepSpeed, or {torch_files.WEIGHTS} (or its index). Pass a directory that has "
        f"one of these. Directories in it: {', '.join(directories) or 'none'}"
    )
