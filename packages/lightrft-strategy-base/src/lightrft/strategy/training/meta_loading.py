"""`from_pretrained` on ranks that are given their weights by rank 0: it builds the model, and reads no weights.

transformers (5.19) refuses `from_pretrained` where the meta device is the default, because there would be nothing to
load. Here that is what is wanted: the names, shapes, types and conversions of what was loaded, and none of the values.
The patches may go when `from_pretrained` can build a model that way itself.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch


@contextmanager
def nothing_loaded() -> Iterator[None]:
    """In the body models are built on the meta device, those of transformers' `from_pretrained` too."""
    with torch.device("meta"):
        if "transformers" not in sys.modules:
            yield
            return
        with _patched():
            yield


@contextmanager
def _patched() -> Iterator[None]:
    from transformers import PreTrainedModel, core_model_loading

    load, read = PreTrainedModel.from_pretrained, core_model_loading._materialize_copy
    fill = PreTrainedModel._load_pretrained_model

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):  # as a default, the meta device would be refused; the patches below see to it
            return load.__func__(cls, *args, **kwargs)

    def load_pretrained_model(model: Any, state_dict: Any, files: Any, config: Any, *more: Any) -> Any:
        on_meta = replace(config, device_map={"": torch.device("meta")})
        return fill(model, state_dict, files, on_meta, *more)

    def materialize(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        if isinstance(tensor, torch.Tensor) or dtype is None:
            found: torch.Tensor = read(tensor, device, dtype)
            return found.to("meta")
        return torch.empty(tensor.get_shape(), dtype=dtype, device="meta")

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    PreTrainedModel._load_pretrained_model = staticmethod(load_pretrained_model)
    core_model_loading._materialize_copy = materialize
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = load
        PreTrainedModel._load_pretrained_model = staticmethod(fill)
        core_model_loading._materialize_copy = read
