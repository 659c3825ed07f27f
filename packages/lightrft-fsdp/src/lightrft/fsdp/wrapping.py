"""Which modules of a model FSDP2 shards as units of their own.

A model says so itself: transformers models name their layers in ``_no_split_modules``, and a model of your
own may do the same. Each layer is gathered for its own forward and backward and given back in between; what
is left, embeddings and heads, tied or not, is the root's.
"""

import re

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

    ``mixed_modalities``: leave out vision and audio layers, which then belong to the root, so that a rank
    whose batch has no images need not gather what it does not use.

    Raises `UnsupportedOperationError` where the model declares no layers, or none that it has.
    """
    classes = layer_classes(module)
    found = [
        (path, part)
        for path, part in module.named_modules()
        if type(part).__name__ in classes and not (mixed_modalities and _OTHER_MODALITY.search(path))
    ]
    if not found:
        declared = (
            f"none of the classes that it declares ({', '.join(sorted(classes))}) is in it"
            if classes
            else "it declares none"
        )
        raise UnsupportedOperationError(
            f"FSDP2 shards a model layer by layer, and {type(module).__name__} has no layers to wrap: {declared}. Set "
            f"_no_split_modules = ['NameOfItsLayerClass'] on the model's class"
        )
    return [part for _, part in reversed(found)]
