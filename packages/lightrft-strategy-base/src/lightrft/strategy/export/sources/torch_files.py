"""Files that ``torch.save`` wrote, which are pickles: read without running what they may carry, unless that is allowed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from lightrft.config import CheckpointError
from lightrft.strategy.export.sources.source import empty, reading

WEIGHTS = "pytorch_model.bin"


class TorchFileSource:
    """A state dict in one file, as Hugging Face models had it once."""

    names: Literal["saved", "in memory"] = "saved"

    def __init__(self, place: Path, *, allow_pickle: bool) -> None:
        self.place = place
        self._tensors: Mapping[str, torch.Tensor] = load_torch_file(place / WEIGHTS, allow_pickle=allow_pickle)
        self.contents: Mapping[str, torch.Tensor] = {
            name: empty(tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()
        }

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The file is mapped for as long as this object lives."""
        yield

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self._tensors[name]


def load_torch_file(path: Path, *, allow_pickle: bool) -> Any:
    """What ``torch.save`` wrote: tensors and plain values, or with ``allow_pickle`` anything, which may run code."""
    with reading(path), torch.serialization.safe_globals(_INERT):
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if foreign and not allow_pickle:
            raise CheckpointError(
                f"{path} holds more than tensors and plain values ({', '.join(sorted(foreign)[:3])}), and reading it can run "
                f"code that came with it; if you trust it, say allow_pickle=True (--allow-pickle)"
            )
        return torch.load(path, map_location="cpu", weights_only=not foreign, mmap=True)


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
]
"""What DeepSpeed's files name, beside tensors and plain values."""
