"""One part's tensors: the types in which they are gathered and written, and the files that hold them."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightrft.config import ArgumentError
from lightrft.strategy.backend import Backend
from lightrft.strategy.export.parts import Part
from lightrft.strategy.export.tensor_files import FileLayout, file_layouts
from lightrft.strategy.rollout import weights
from lightrft.strategy.rollout.saved_form import Unit

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_HALF = (torch.float16, torch.bfloat16)


def bytes_of_size(size: int | str) -> int:
    """A size in bytes, of a number or of text such as "5GB". Raises `ArgumentError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    number = float(match[1]) * _UNITS.get(match[2].upper(), math.nan) if match else math.nan
    if not number >= 1:
        raise ArgumentError(f"max_shard_size={size!r}; wanted bytes, as a number or as text such as '5GB'")
    return int(number)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    dtype: torch.dtype | None
    """Of floating tensors; None: that in which each is held."""
    shard_bytes: int
    """The largest file, unless one tensor is larger."""
    bucket_bytes: int
    """What is gathered at a time."""
    merge_adapters: bool = False
    processors: Mapping[str, Any] = field(default_factory=dict)
    """Tokenizer and processor, by the names of their arguments."""


class Plan:
    """What is written of one part, and how."""

    def __init__(self, backend: Backend, module: nn.Module, part: Part, options: Options) -> None:
        self.part, self._backend, self._options = part, backend, options
        self._kept = kept_in_fp32(module, options.dtype)
        self.contents = part.form.convert({name: self._empty(name, it) for name, it in part.form.tensors.items()})

    def _empty(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The whole tensor as it will be written, without values."""
        dtype = tensor.dtype
        if self._options.dtype is not None and tensor.is_floating_point():
            dtype = torch.float32 if self._is_kept(name) else self._options.dtype
        return torch.empty(self._backend._full_shape(tensor), dtype=dtype, device="meta")

    def _is_kept(self, name: str) -> bool:
        return self._kept is not None and self._kept.search(name) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.contents.values())

    def layouts(self) -> list[FileLayout]:
        """The files to write."""
        limit = self._options.shard_bytes if self.part.splits else self.nbytes
        return file_layouts(self.contents, self.part.stem, limit)

    def stream(self) -> Iterator[weights.Bucket]:
        """The tensors, whole, on every rank. Those that need it come in fp32, to be cast when they are written."""
        plain: list[Unit] = []
        precise: list[Unit] = []
        for unit in self.part.form.units:
            needs_it = self.part.merges(unit) or any(self._is_kept(name) for name in unit)
            (precise if needs_it else plain).append(unit)
        backend, form, limit = self._backend, self.part.form, self._options.bucket_bytes
        yield from weights.stream(backend, form, plain, limit, self._options.dtype)
        yield from weights.stream(backend, form, precise, limit, torch.float32)


def kept_in_fp32(module: Any, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Names of what transformers keeps in fp32 in a model of half precision, such as the biases of routers."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if not kept or dtype not in _HALF:
        return None
    return re.compile("|".join(rf"((^|\.){re.escape(name)}($|\.))" for name in sorted(kept)))
