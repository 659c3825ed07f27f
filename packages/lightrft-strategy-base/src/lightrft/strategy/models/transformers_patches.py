"""Patches of transformers 5, and the internals of it that this package uses. Importing this module imports no transformers.

The targets are checked where they are needed: those of `META_LOADING` on entering `init_model_context(meta_init=True)`,
those of `CONVERSION` when a model of transformers is prepared. Those of transformers 4.57 are in `transformers_4.py`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.strategy.patching import Patch, Target, around, require

_SOURCE = "https://github.com/huggingface/transformers/blob/v5.19.0/src/transformers"
_REFUSAL = "https://github.com/huggingface/transformers/pull/40942"
VERSIONS = ">=5.10,<6"
VERSIONS_4 = ">=4.57,<5"
_UNTIL = "from_pretrained can build a model on the meta device, with the conversions of its checkpoint."


def is_transformers_model(module: nn.Module) -> bool:
    """Return whether ``module`` is a model of transformers, without importing transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def is_version_4() -> bool:
    """Return whether transformers is imported and of version 4."""
    return getattr(sys.modules.get("transformers"), "__version__", "").startswith("4.")


def is_version_4_model(module: nn.Module) -> bool:
    """Return whether ``module`` is a model of transformers 4."""
    return is_version_4() and is_transformers_model(module)


def check(call: str, targets: Iterable[Target]) -> None:
    """Raise `StrategyError` if the installed transformers lacks one of ``targets``, which ``call`` needs."""
    require(call, "transformers", VERSIONS_4 if is_version_4() else VERSIONS, targets)


# from_pretrained on the meta device


def _on_cpu_by_default(original: Callable[..., object], *args: object, **kwargs: object) -> object:
    with torch.device("cpu"):
        return original(*args, **kwargs)


def _load_onto_meta(
    original: Callable[..., object], model: nn.Module, state_dict: object, checkpoint_files: object, load_config: Any,
    *args: Any, **kwargs: Any,
) -> object:  # fmt: skip
    on_meta = replace(load_config, device_map={"": torch.device("meta")})
    return original(model, state_dict, checkpoint_files, on_meta, *args, **kwargs)


def _read_nothing(
    original: Callable[..., torch.Tensor], tensor: Any, device: object = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``tensor`` is a tensor, or a slice of a safetensors file that is not read yet but has a shape."""
    if isinstance(tensor, torch.Tensor) or dtype is None:
        return original(tensor, device, dtype).to("meta")
    return torch.empty(tensor.get_shape(), dtype=dtype, device="meta")


FROM_PRETRAINED = Patch(
    target="transformers.modeling_utils:PreTrainedModel.from_pretrained",
    replacement=around(_on_cpu_by_default),
    why="transformers refuses `from_pretrained` if meta is the default device. Ranks that receive their weights "
    "from rank 0 need the model without values: names, shapes, dtypes and conversions.",
    upstream=_REFUSAL,
    versions=">=4.57,<6",
    until=_UNTIL,
)
META_LOADING = (
    FROM_PRETRAINED,
    Patch(
        target="transformers.modeling_utils:PreTrainedModel._load_pretrained_model",
        parameters=("model", "state_dict", "checkpoint_files", "load_config"),
        replacement=around(_load_onto_meta),
        why="Loads every weight onto the meta device. `from_pretrained` takes a device_map for that only if accelerate "
        "is installed, and not with ZeRO-3.",
        upstream=f"{_SOURCE}/integrations/accelerate.py#L136",
        versions=VERSIONS,
        until=_UNTIL,
    ),
    Patch(
        target="transformers.core_model_loading:_materialize_copy",
        parameters=("tensor", "device", "dtype"),
        replacement=around(_read_nothing),
        why="transformers reads a weight from its file before it moves it to the meta device.",
        upstream=f"{_SOURCE}/core_model_loading.py#L1236",
        versions=VERSIONS,
        until="weights whose device is meta are not read.",
    ),
)


@contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """Apply ``patches`` in the body."""
    with ExitStack() as undoing:
        for patch in patches:
            undoing.callback(patch.apply())
        yield


# Conversions between memory and checkpoint


@dataclass(frozen=True, kw_only=True)
class _Reader(Target):
    """A function that reads an attribute by a name, given as a string."""

    attribute: str

    @override
    def missing(self, instance: object | None = None) -> str | None:
        lacking = super().missing(instance)
        if lacking is None and self.attribute not in getattr(self.owner(), self.name).__code__.co_consts:
            return f"{self.target.replace(':', '.')} does not read {self.attribute}"
        return lacking


CONVERSION = (
    _Reader(
        target="transformers.core_model_loading:revert_weight_conversion",
        parameters=("model", "state_dict"),
        attribute="_weight_conversions",
    ),
    Target(target="transformers.core_model_loading:rename_source_key", parameters=("base_model_prefix",)),
    Target(target="transformers.core_model_loading:dot_natural_key"),
    Target(target="transformers.core_model_loading:PrefixChange"),
    Target(target="transformers.core_model_loading:WeightRenaming.add_tensor"),
    Target(target="transformers.core_model_loading:WeightRenaming.rename_source_key"),
    Target(target="transformers.core_model_loading:WeightConverter.reverse_transform"),
    Target(target="transformers.conversion_mapping:get_model_conversion_mapping", parameters=("add_legacy",)),
)


@contextmanager
def attached_conversions(module: nn.Module, conversions: Sequence[object]) -> Iterator[None]:
    """Attach ``conversions`` to ``module`` in the body, where `revert_weight_conversion` looks for them.

    transformers takes no conversions as an argument; without the attribute it finds them by the names of classes, which
    wrapping may change: https://github.com/huggingface/transformers/blob/v5.19.0/src/transformers/core_model_loading.py#L1808
    (>=5.10,<6). This can go when `revert_weight_conversion` takes conversions.
    """
    attributes = vars(module)
    before = attributes.get("_weight_conversions")
    attributes["_weight_conversions"] = list(conversions)
    try:
        yield
    finally:
        if before is None:
            del attributes["_weight_conversions"]
        else:
            attributes["_weight_conversions"] = before
