"""Which modules of a model FSDP2 shards as units of their own.

A model says so itself: transformers models name their layers in ``_no_split_modules``, and a model of your
own may do the same. Each layer is gathered for its own forward and backward and given back in between; what
is left, embeddings and heads, tied or not, is the root's.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lightrft.config import UnsupportedOperationError

_OTHER_MODALITY = re.compile(r"(^|[._])(vis|image|video|audio)")
"""Names of the submodules that text alone does not pass through: ``visual``, ``vision_tower``, ``audio_model``."""


def layer_classes(module: nn.Module) -> set[str]:
    """Names of the layer classes that ``module``, or a part of it, declares."""
    declared: set[str] = set()
    for part in module.modules():
        names = getattr(part, "_no_split_modules", None) or ()
        declared.update([names] if isinstance(names, str) else names)
    return declared


def layers_to_shard(module: nn.Module, *, mixed_modalities: bool = False) -> list[nn.Module]:
    """The layers of ``module``, inner ones first.

    A layer that shares parameters with what is outside it, an embedding tied to the head for example, is left to the
    root. ``mixed_modalities``: leave out vision and audio layers too, so that a rank whose batch has no images need
    not gather what it does not use.

    Raises `UnsupportedOperationError` where the model declares no layers, or none that can be sharded.
    """
    classes = layer_classes(module)
    declared = [(path, part) for path, part in module.named_modules() if path and type(part).__name__ in classes]
    holders = _holders(module)
    found = [
        part
        for path, part in declared
        if _stands_alone(path, part, holders) and not (mixed_modalities and _OTHER_MODALITY.search(path))
    ]
    if not found:
        raise UnsupportedOperationError(
            f"FSDP2 shards a model layer by layer, and {type(module).__name__} has no layers to wrap: "
            f"{_reason(classes, declared)}. Set _no_split_modules = ['NameOfItsLayerClass'] on the model's class"
        )
    return found[::-1]


def _holders(module: nn.Module) -> dict[int, list[str]]:
    """Every path at which each parameter stands, by its ``id``."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _stands_alone(path: str, part: nn.Module, holders: Mapping[int, Sequence[str]]) -> bool:
    """Whether no parameter of the layer at ``path`` stands outside it too."""
    return all(name.startswith(f"{path}.") for it in part.parameters() for name in holders[id(it)])


def _reason(classes: Collection[str], declared: Collection[object]) -> str:
    if not classes:
        return "it declares none"
    names = ", ".join(sorted(classes))
    if declared:
        return f"all that it declares ({names}) share parameters with other parts, or are of other modalities than text"
    return f"none of the classes that it declares ({names}) is in it"
