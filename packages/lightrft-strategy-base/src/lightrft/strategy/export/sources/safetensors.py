"""Hugging Face directories: safetensors in one file, or in several with an index."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from lightrft.config import CheckpointError
from lightrft.strategy.checkpoint.layout import DTYPES
from lightrft.strategy.export.sources.source import REMEDY, empty, reading

BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


class SafetensorsSource:
    """The tensors of ``model`` or ``adapter_model`` files. They are mapped: a read costs what is touched."""

    names: Literal["saved", "in memory"] = "saved"

    def __init__(self, place: Path, stem: str) -> None:
        self.place = place
        self._files = _files(place, stem)
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
        for file in dict.fromkeys(self._files.values()):
            with reading(self.place / file), safe_open(self.place / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    there = opened.get_slice(name)
                    found[name] = empty(there.get_shape(), BY_NAME[there.get_dtype()])
        lost = [name for name in self._files if name not in found] if "" not in self._files else []
        if lost:
            raise CheckpointError(
                f"{self.place / self._files[lost[0]]} lacks {', '.join(lost[:3])}, which the index places there; {REMEDY}"
            )
        return found

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        file = self._files.get(name) or self._files[""]
        with reading(self.place / file):
            if file not in self._open:
                self._open[file] = safe_open(self.place / file, framework="pt")
            found: torch.Tensor = self._open[file].get_tensor(name)
            return found


def is_here(place: Path, stem: str) -> bool:
    """Whether ``place`` has safetensors of this name."""
    return (place / f"{stem}.safetensors").exists() or (place / f"{stem}.safetensors.index.json").exists()


def _files(place: Path, stem: str) -> dict[str, str]:
    """The file of each tensor by name; of all of them under "" where there is one file."""
    index = place / f"{stem}.safetensors.index.json"
    if not index.exists():
        return {"": f"{stem}.safetensors"}
    with reading(index):
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(it, str) and Path(it).name == it for it in found.values()):
            raise CheckpointError(f"{index} names files elsewhere; {REMEDY}")
        return dict(found)
