"""Finds weights that a model did not use: SGLang's models skip names that they do not know without an error."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch


class WatchedTensor(torch.Tensor):
    """A tensor that records whether an operation used its values, in any thread. Reading its metadata does not count."""

    used: bool

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if not isinstance(result, (bool, int, str, torch.Size, torch.dtype, torch.device)):  # metadata
            for tensor in _watched_tensors((*args, *(kwargs or {}).values())):
                tensor.used = True
        return result


def _watched_tensors(values: Sequence[object]) -> Iterator[WatchedTensor]:
    for value in values:
        if isinstance(value, WatchedTensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _watched_tensors(value)


def watched(named: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, WatchedTensor]]:
    """``named`` as watched tensors, none of them used yet."""
    weights = [(name, tensor.as_subclass(WatchedTensor)) for name, tensor in named]
    for _, tensor in weights:
        tensor.used = False
    return weights


def unused_weights(weights: Sequence[tuple[str, WatchedTensor]]) -> list[str]:
    """Names of the weights that no operation used."""
    return [name for name, tensor in weights if not tensor.used]
