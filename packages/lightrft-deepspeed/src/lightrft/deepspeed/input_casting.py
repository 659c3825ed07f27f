"""Inputs of a model, cast to the type in which it computes."""

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle


def cast_inputs(module: nn.Module, dtype: torch.dtype) -> RemovableHandle:
    """Cast floating tensors that ``module`` is called with to ``dtype``, as FSDP2 does and autocast would."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tree_map_only(torch.Tensor, cast, args), tree_map_only(torch.Tensor, cast, kwargs)

    return module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
