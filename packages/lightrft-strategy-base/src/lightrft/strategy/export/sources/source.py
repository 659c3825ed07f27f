"""The interface of all weight formats: the names and shapes at once, and the tensors one at a time."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch

from lightrft.config import CheckpointError

REMEDY = "copy the directory again, or save it again"


class Source(Protocol):
    """A directory of weights. Opening one finds files that are missing or too short."""

    path: Path
    names: Literal["saved", "in memory"]
    """Whether names and layouts are those that `save_pretrained` writes, or those of a state dict."""

    @property
    def contents(self) -> Mapping[str, torch.Tensor]:
        """All tensors by name, on the meta device."""

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor on the CPU, which may be memory-mapped. Called inside `opened`."""

    def opened(self) -> AbstractContextManager[object]:
        """Return the context in which `read` is called."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on the meta device, which has a shape and a dtype and no memory."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Convert any error of the body to a `CheckpointError` that names ``path`` and what was ``expected`` there."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"expected {expected} at {path}, found no such file; {REMEDY}") from error
    except Exception as error:
        raise CheckpointError(
            f"expected {expected} at {path}, got a file that cannot be read: {error} ({type(error).__name__}); {REMEDY}"
        ) from error


def weight_map(path: Path, file: str) -> dict[str, str]:
    """Return the file of each tensor, by name, from the index of ``file`` in ``path``; empty if there is no index."""
    index = path / f"{file}.index.json"
    if not index.exists():
        return {}
    with reading(index, "an index of weights"):
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file_name, str) and Path(file_name).name == file_name for file_name in file_of.values()):
            raise CheckpointError(f"expected {index} to name files in its own directory, got other paths; {REMEDY}")
        return dict(file_of)


def check_indexed(path: Path, file_of: Mapping[str, str], present: Collection[str]) -> None:
    """Raise `CheckpointError` if files lack tensors that are listed in their index, ``file_of``."""
    missing = [name for name in file_of if name not in present]
    if missing:
        raise CheckpointError(
            f"expected {', '.join(missing[:3])} in {path / file_of[missing[0]]}, as listed in its index, found none; {REMEDY}"
        )
