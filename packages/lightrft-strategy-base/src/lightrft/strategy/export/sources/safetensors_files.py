"""Hugging Face directories: safetensors in one file, or in several with an index."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open

from lightrft.strategy.checkpoint.format import DTYPES_BY_NAME
from lightrft.strategy.export.sources.source import check_indexed, empty, reading, weight_map

_EXPECTED = "a safetensors file"


class SafetensorsSource:
    """The tensors of ``model`` or ``adapter_model`` files, memory-mapped: a read loads only the pages that are used."""

    names: Literal["saved", "in memory"] = "saved"

    def __init__(self, path: Path, stem: str) -> None:
        self.path = path
        self._single = f"{stem}.safetensors"
        self._files = weight_map(path, self._single)
        self._open: dict[str, Any] = {}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep files open for `read`."""
        try:
            yield
        finally:
            self._open.clear()

    @cached_property
    def contents(self) -> Mapping[str, torch.Tensor]:
        """All tensors by name, on the meta device."""
        contents: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(self._files.values()) or [self._single]:
            with reading(self.path / file, _EXPECTED), safe_open(self.path / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    stored = opened.get_slice(name)
                    contents[name] = empty(stored.get_shape(), DTYPES_BY_NAME[stored.get_dtype()])
        check_indexed(self.path, self._files, contents)
        return contents

    def read(self, name: str) -> torch.Tensor:
        """Return a full tensor."""
        file = self._files.get(name, self._single)
        with reading(self.path / file, _EXPECTED):
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            return cast(torch.Tensor, self._open[file].get_tensor(name))


def found_in(path: Path, stem: str) -> bool:
    """Return whether ``path`` has safetensors files of this name."""
    return (path / f"{stem}.safetensors").exists() or (path / f"{stem}.safetensors.index.json").exists()
