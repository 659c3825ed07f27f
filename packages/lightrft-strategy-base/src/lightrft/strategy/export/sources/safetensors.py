"""Hugging Face directories: safetensors in one file, or in several with an index."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from lightrft.strategy.checkpoint.layout import DTYPES
from lightrft.strategy.export.sources.source import check_indexed, empty, reading, weight_map

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_EXPECTED = "a safetensors file"


class SafetensorsSource:
    """The tensors of ``model`` or ``adapter_model`` files. They are mapped: a read costs what is touched."""

    names: Literal["saved", "in memory"] = "saved"

    def __init__(self, place: Path, stem: str) -> None:
        self.place = place
        self._single = f"{stem}.safetensors"
        self._files = weight_map(place, self._single)
        self._open: dict[str, Any] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Around `read`: keeps files open."""
        try:
            yield
        finally:
            self._open.clear()

    @cached_property
    def contents(self) -> Mapping[str, torch.Tensor]:
        """All tensors by name, on the meta device."""
        found: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(self._files.values()) or [self._single]:
            with reading(self.place / file, _EXPECTED), safe_open(self.place / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    there = opened.get_slice(name)
                    found[name] = empty(there.get_shape(), BY_NAME[there.get_dtype()])
        check_indexed(self.place, self._files, found)
        return found

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        file = self._files.get(name, self._single)
        with reading(self.place / file, _EXPECTED):
            if file not in self._open:
                self._open[file] = safe_open(self.place / file, framework="pt")
            found: torch.Tensor = self._open[file].get_tensor(name)
            return found


def is_here(place: Path, stem: str) -> bool:
    """Whether ``place`` has safetensors of this name."""
    return (place / f"{stem}.safetensors").exists() or (place / f"{stem}.safetensors.index.json").exists()
