"""Files of ``torch.save``, which are pickles: read without running code from them, unless that is allowed."""

import pickle
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.export.sources.source import check_indexed, empty, reading, weight_map

WEIGHTS = "pytorch_model.bin"


class TorchFileSource:
    """A state dict in one file, or in several with an index: the old format of Hugging Face models."""

    names: Literal["saved", "in memory"] = "saved"
    opened = nullcontext
    """The files stay mapped as long as this object exists."""

    def __init__(self, path: Path, *, allow_pickle: bool) -> None:
        self.path = path
        file_of = weight_map(path, WEIGHTS)
        self._tensors: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(file_of.values()) or [WEIGHTS]:
            self._tensors |= _state_dict(path / file, allow_pickle)
        check_indexed(path, file_of, self._tensors)
        self.contents: Mapping[str, torch.Tensor] = {
            name: empty(tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return a full tensor."""
        return self._tensors[name]


def found_in(path: Path) -> bool:
    """Return whether ``path`` has weights in files of ``torch.save``."""
    return (path / WEIGHTS).exists() or (path / f"{WEIGHTS}.index.json").exists()


def _state_dict(path: Path, allow_pickle: bool) -> Mapping[str, torch.Tensor]:
    state = load_torch_file(path, allow_pickle=allow_pickle)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(
            f"expected {path} to hold only a state dict (tensors by name), got other values. Save model.state_dict() alone"
        )
    return state


def load_torch_file(path: Path, *, allow_pickle: bool) -> Any:
    """Return what ``torch.save`` wrote: tensors and plain values; with ``allow_pickle`` anything, which may run code."""
    with reading(path, "a file of torch.save"), torch.serialization.safe_globals(_INERT):
        zipped = zipfile.is_zipfile(path)  # False for files of torch before 1.6
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        if foreign and not allow_pickle:
            raise CheckpointError(
                f"expected {path} to hold tensors and plain values, got {', '.join(sorted(foreign)[:3])}, which can run "
                f"code. If you trust the file, pass allow_pickle=True (--allow-pickle)"
            )
        if foreign:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        return load_safely(path, mmap=zipped)


def load_safely(file: Path | BinaryIO, *, mmap: bool = False) -> Any:
    """Return tensors and plain values that ``torch.save`` wrote. Raise `ValueError` for anything else."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # whose message recommends to run code from the file
        raise ValueError("it is damaged, or contains more than tensors and plain values") from error


class _Inert:
    """Placeholder for a class that a file names and that is not needed here."""

    def __init__(self, *_: object, **__: object) -> None: ...


def _inert(name: str) -> tuple[type[_Inert], str]:
    return type(name.rpartition(".")[2], (_Inert,), {}), name


_INERT: list[Any] = [
    _inert("deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    _inert("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    _inert("deepspeed.runtime.zero.config.ZeroStageEnum"),
    _inert("deepspeed.utils.tensor_fragment.fragment_address"),
    (_Inert, "builtins.getattr"),  # with which Python 3.11.0 to 3.11.3 pickle enum members
]
"""Classes that DeepSpeed's files name."""
