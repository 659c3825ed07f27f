"""Files that ``torch.save`` wrote, which are pickles: read without running what they may carry, unless that is allowed."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.export.sources.source import check_indexed, empty, reading, weight_map

WEIGHTS = "pytorch_model.bin"


class TorchFileSource:
    """A state dict in one file, or in several with an index, as Hugging Face models had them once."""

    names: Literal["saved", "in memory"] = "saved"

    def __init__(self, place: Path, *, allow_pickle: bool) -> None:
        self.place = place
        files = weight_map(place, WEIGHTS)
        self._tensors: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(files.values()) or [WEIGHTS]:
            self._tensors |= _state_dict(place / file, allow_pickle)
        check_indexed(place, files, self._tensors)
        self.contents: Mapping[str, torch.Tensor] = {
            name: empty(tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()
        }

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The files are mapped for as long as this object lives."""
        yield

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self._tensors[name]


def is_here(place: Path) -> bool:
    """Whether ``place`` has weights in files of this kind."""
    return (place / WEIGHTS).exists() or (place / f"{WEIGHTS}.index.json").exists()


def _state_dict(path: Path, allow_pickle: bool) -> Mapping[str, torch.Tensor]:
    found = load_torch_file(path, allow_pickle=allow_pickle)
    if not isinstance(found, Mapping) or not all(isinstance(it, torch.Tensor) for it in found.values()):
        raise CheckpointError(f"{path} holds no state dict, tensors by name, alone; write one there with torch.save")
    return found


def load_torch_file(path: Path, *, allow_pickle: bool) -> Any:
    """What ``torch.save`` wrote: tensors and plain values, or with ``allow_pickle`` anything, which may run code."""
    with reading(path, "a file of torch.save"), torch.serialization.safe_globals(_INERT):
        zipped = zipfile.is_zipfile(path)  # or it was written by a torch before 1.6
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        if foreign and not allow_pickle:
            raise CheckpointError(
                f"{path} holds more than tensors and plain values ({', '.join(sorted(foreign)[:3])}), and reading it can run "
                f"code that came with it; if you trust it, say allow_pickle=True (--allow-pickle)"
            )
        if foreign:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        return load_safely(path, mmap=zipped)


def load_safely(file: Path | BinaryIO, *, mmap: bool = False) -> Any:
    """Tensors and plain values that ``torch.save`` wrote. Raises `ValueError` for anything else."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:  # its text advises to run whatever is in the file
        raise ValueError("it holds more than tensors and plain values, or is damaged") from error


class _Inert:
    """Stands for a class that a file names and nobody here needs: objects without behaviour."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


def _inert(name: str) -> tuple[type[_Inert], str]:
    return type(name.rpartition(".")[2], (_Inert,), {}), name


_INERT: list[Any] = [
    _inert("deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    _inert("deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    _inert("deepspeed.runtime.zero.config.ZeroStageEnum"),
    _inert("deepspeed.utils.tensor_fragment.fragment_address"),
    (_Inert, "builtins.getattr"),  # by which Python 3.11.0 to 3.11.3 pickle the members of an enumeration
]
"""What DeepSpeed's files name, beside tensors and plain values."""
