"""The checkpoint that an engine is built from: names and shapes of its weights, and what a sync must deliver.

Only the headers of the safetensors files are read.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from lightrft.engines.naming import sender_names
from lightrft.strategy.export.sources.source import weight_map

_DERIVED = (r"\.rotary_emb\.inv_freq$", r"\.masked_bias$")
"""What old checkpoints carry, and every engine computes for itself."""
_HEAD = r"(^|\.)lm_head\.weight$"


def stored_shapes(directory: Path) -> dict[str, torch.Size] | None:
    """Names and shapes in a Hugging Face directory; None where it has no safetensors files."""
    files = _weight_files(directory)
    if not files:
        return None
    shapes: dict[str, torch.Size] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            shapes.update({name: torch.Size(stored.get_slice(name).get_shape()) for name in stored.keys()})  # noqa: SIM118
    return shapes


def _weight_files(directory: Path) -> list[Path]:
    """Those that make up the model: of the index, where there is one; else the usual one; else all."""
    indexed, alone = weight_map(directory, "model.safetensors"), directory / "model.safetensors"
    if indexed:
        return [directory / name for name in sorted(set(indexed.values()))]
    return [alone] if alone.exists() else sorted(directory.glob("*.safetensors"))


def due_shapes(stored: Mapping[str, torch.Size], *, tied: bool, ignored: Collection[str] = ()) -> dict[str, torch.Size]:
    """``stored`` without what no sync delivers: derived tensors, a tied head, and names that match ``ignored``."""
    patterns = [re.compile(it) for it in (*_DERIVED, *ignored, *([_HEAD] if tied else ()))]
    return {name: shape for name, shape in stored.items() if not any(it.search(name) for it in patterns)}


def expected_shapes(due: Mapping[str, torch.Size], sent: Collection[str]) -> dict[str, torch.Size]:
    """``due`` under the names that a sender uses which has the names ``sent``; what it has not stays as it is."""
    names = sender_names(due, sent)
    return {names[name]: shape for name, shape in due.items()}
