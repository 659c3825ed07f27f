"""Whether a model took what it was given: SGLang's models leave out, without a word, weights whose names they do not know."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch


class Watched(torch.Tensor):
    """A tensor that knows whether anything was computed of it, in whatever thread, or whether it was only looked at."""

    taken: bool

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        is_fact = isinstance(result, (bool, int, str, torch.Size, torch.dtype, torch.device))
        if not is_fact:
            for tensor in _tensors((*args, *(kwargs or {}).values())):
                tensor.taken = True
        return result


def _tensors(values: Sequence[Any]) -> Iterator[Watched]:
    for it in values:
        if isinstance(it, Watched):
            yield it
        elif isinstance(it, (tuple, list)):
            yield from _tensors(it)


def watched(named: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, Watched]]:
    """``named``, of which nothing was taken yet."""
    found = [(name, tensor.as_subclass(Watched)) for name, tensor in named]
    for _, tensor in found:
        tensor.taken = False
    return found


def left_out(weights: Sequence[tuple[str, Watched]]) -> list[str]:
    """Names of those of which nothing was taken."""
    return [name for name, tensor in weights if not tensor.taken]
