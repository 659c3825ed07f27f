"""The weights that each sync must deliver: names and shapes in the checkpoint that an engine was built from.

Reads only the headers of the safetensors files.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from lightrft.engines.weight_names import sender_names
from lightrft.strategy.export.sources.source import weight_map

_DERIVED = (r"\.rotary_emb\.inv_freq$", r"\.masked_bias$")
"""Tensors of old checkpoints that every engine computes itself."""
_HEAD = r"(^|\.)lm_head\.weight$"


def stored_shapes(directory: Path) -> dict[str, torch.Size] | None:
    """Names and shapes in a Hugging Face directory; None if it has no safetensors files."""
    files = _weight_files(directory)
    if not files:
        return None
    shapes: dict[str, torch.Size] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            shapes.update({name: torch.Size(stored.get_slice(name).get_shape()) for name in stored.keys()})  # noqa: SIM118
    return shapes


def _weight_files(directory: Path) -> list[Path]:
    """The files of the model: those of the index if there is one, else model.safetensors, else all."""
    indexed, single = weight_map(directory, "model.safetensors"), directory / "model.safetensors"
    if indexed:
        return [directory / name for name in sorted(set(indexed.values()))]
    return [single] if single.exists() else sorted(directory.glob("*.safetensors"))


def delivered_shapes(
    stored: Mapping[str, torch.Size], *, tied: bool, ignored: Collection[str] = ()
) -> dict[str, torch.Size]:
    """The part of ``stored`` that a sync delivers.

    Args:
        stored: Names and shapes in the checkpoint.
        tied: Whether the output head is tied to the input embeddings; a sync then does not deliver it.
        ignored: Patterns of names that the model ignores when it loads.
    """
    patterns = [re.compile(pattern) for pattern in (*_DERIVED, *ignored, *([_HEAD] if tied else ()))]
    return {name: shape for name, shape in stored.items() if not any(pattern.search(name) for pattern in patterns)}


def expected_shapes(delivered: Mapping[str, torch.Size], sent: Collection[str]) -> dict[str, torch.Size]:
    """``delivered`` under the names that a sender uses.

    Args:
        delivered: Names and shapes that a sync must deliver, under the names in the checkpoint.
        sent: The sender's names; a weight that is not among them keeps its name.
    """
    names = sender_names(delivered, sent)
    return {names[name]: shape for name, shape in delivered.items()}
