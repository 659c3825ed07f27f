"""What every kind of directory offers: what is in it, at once, and tensors, one at a time."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol

import torch

from lightrft.config import CheckpointError

REMEDY = "load another copy, or write it again"


class Source(Protocol):
    """Weights in a directory. Opening one finds what is missing or too short."""

    place: Path
    names: Literal["saved", "in memory"]
    """Whether names and form are those of `save_pretrained`, or of a state dict."""

    @property
    def contents(self) -> Mapping[str, torch.Tensor]:
        """All tensors by name, on the meta device."""

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor on the CPU, which may be mapped from the file and cost memory only where it is touched."""

    def opened(self) -> AbstractContextManager[object]:
        """Around `read`."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory: its shape and type are all that it has."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def listed(what: str, names: Sequence[str]) -> str:
    """The first of ``names``, as a part of a sentence; nothing where there are none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}; " if names else ""


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong in the body into a `CheckpointError` that names ``path`` and ``what`` was expected there."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {REMEDY}") from error
    except Exception as error:
        raise CheckpointError(f"cannot read {path} as {what}: {error} ({type(error).__name__}); {REMEDY}") from error


def weight_map(place: Path, file: str) -> dict[str, str]:
    """The file of each tensor, by name, as the index of ``file`` in ``place`` says; empty where there is no index."""
    index = place / f"{file}.index.json"
    if not index.exists():
        return {}
    with reading(index, "an index of weights"):
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(it, str) and Path(it).name == it for it in found.values()):
            raise CheckpointError(f"{index} names files elsewhere; {REMEDY}")
        return dict(found)


def check_indexed(place: Path, files: Mapping[str, str], found: Collection[str]) -> None:
    """Raise `CheckpointError` where the files lack what their index, ``files``, places there."""
    lost = [name for name in files if name not in found]
    if lost:
        raise CheckpointError(
            f"{place / files[lost[0]]} lacks {', '.join(lost[:3])}, which the index places there; {REMEDY}"
        )
