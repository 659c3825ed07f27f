"""Which modules of a model FSDP2 shards as separate units.

A model declares them: transformers models name their layer classes in ``_no_split_modules``, and your own model may do the
same. FSDP2 gathers each layer for its own forward and backward pass and frees it in between. What is left, embeddings and
heads, tied or not, belongs to the root.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from lightrft.config import UnsupportedOperationError

_OTHER_MODALITY = re.compile(r"(^|[._])(vis|image|video|audio)")
"""Names of submodules that text-only batches do not use: ``visual``, ``vision_tower``, ``audio_model``."""


def layer_classes(module: nn.Module) -> set[str]:
    """Return the names of the layer classes that ``module``, or a submodule, declares."""
    declared: set[str] = set()
    for part in module.modules():
        names = getattr(part, "_no_split_modules", None) or ()
        declared.update([names] if isinstance(names, str) else names)
    return declared


def layers_to_shard(module: nn.Module, *, mixed_modalities: bool = False) -> list[nn.Module]:
    """Return the layers of ``module`` to shard, inner ones first.

    A layer that shares parameters with something outside it, an embedding tied to the head for example, is left to the
    root.

    Args:
        module: The model.
        mixed_modalities: Leave out vision and audio layers too, so that a rank whose batch has no images need not gather
            what it does not use.

    Raises:
        UnsupportedOperationError: The model declares no layers, or none that can be sharded.
    """
    classes = layer_classes(module)
    declared = [(path, part) for path, part in module.named_modules() if path and type(part).__name__ in classes]
    holders = _holders(module)
    layers = [
        part
        for path, part in declared
        if _shares_no_parameters(path, part, holders) and not (mixed_modalities and _OTHER_MODALITY.search(path))
    ]
    if not layers:
        raise UnsupportedOperationError(
            f"prepare: expected a model with layers that FSDP2 can shard, but {type(module).__name__} has no layers to wrap: "
            f"{_reason(classes, declared)}. Set _no_split_modules = ['NameOfItsLayerClass'] on the model's class"
        )
    return layers[::-1]


def _holders(module: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter, by its ``id``."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _shares_no_parameters(path: str, part: nn.Module, holders: Mapping[int, Sequence[str]]) -> bool:
    """Return whether no parameter of the layer at ``path`` is also used outside it."""
    return all(name.startswith(f"{path}.") for parameter in part.parameters() for name in holders[id(parameter)])


def _reason(classes: Collection[str], declared: Collection[object]) -> str:
    if not classes:
        return "it declares no layer classes"
    names = ", ".join(sorted(classes))
    if declared:
        return f"all layers that it declares ({names}) share parameters with other parts, or are not used for text"
    return f"it contains none of the classes that it declares ({names})"
