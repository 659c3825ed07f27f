"""What the public methods accept as arguments, and the error for anything else: the call, expected, got, remedy."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.config.validation import shown


class Kind(NamedTuple):
    """What an argument may be."""

    words: str
    types: tuple[type, ...]
    excluded: tuple[type, ...] = ()
    least: int | None = None
    below: int | None = None


NONE = type(None)
FLAG = Kind("True or False", (bool, np.bool_))
COUNT = Kind("an integer of at least 1", (Integral,), (bool,), least=1)
INDEX = Kind("an integer of at least 0", (Integral,), (bool,), least=0)
SEED = Kind("an integer of at least 0 and below 2**32", (Integral,), (bool,), least=0, below=2**32)
NUMBER = Kind("a number", (Real,), (bool,))
PATH = Kind("a path", (str, PathLike))
MODULE = Kind("a torch Module", (nn.Module,))
OPTIMIZER = Kind("a torch Optimizer", (Optimizer,))
DTYPE = Kind("a torch.dtype, or None", (torch.dtype, NONE))
FUNCTION = Kind("a function, or None", (Callable, NONE))  # type: ignore[arg-type]
LIST = Kind("a list, or None", (Sequence, np.ndarray, torch.Tensor, NONE), (str, bytes))
SIZE = Kind("an integer of at least 1, or None", (Integral, NONE), (bool,), least=1)


def refusal(call: str, name: str, value: object, kind: Kind, remedy: str = "") -> ArgumentError | ArgumentTypeError:
    """Return the error for ``value`` as the argument ``name`` of ``call``."""
    right_type = isinstance(value, kind.types) and not isinstance(value, kind.excluded)
    error = ArgumentError if right_type else ArgumentTypeError
    return error(f"{call}: expected {name} to be {kind.words}, got {shown(value)}{remedy and f'. {remedy}'}")


def device_of(call: str, device: Any) -> torch.device | None:
    """Return ``device``, an argument of ``call``, as a torch.device; None stays None."""
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = Kind("a torch.device or its name, such as 'cpu' or 'cuda:0'", (str, int))
        raise refusal(call, "device", device, kind) from error


def check_processor(call: str, name: str, value: object) -> None:
    """Raise unless ``value``, an argument of ``call``, is None or can be written with ``save_pretrained``."""
    if value is not None and (isinstance(value, type) or not callable(getattr(value, "save_pretrained", None))):
        kind = Kind("an object with save_pretrained, or None", ())
        raise refusal(call, name, value, kind, "Pass the tokenizer or processor itself, not its name or directory")
