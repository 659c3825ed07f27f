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


class Expected(NamedTuple):
    """What an argument may be."""

    words: str
    types: tuple[type, ...]
    excluded: tuple[type, ...] = ()
    least: int | None = None
    below: int | None = None

    def has_type(self, value: object) -> bool:
        """Return whether ``value`` is of a type that the argument may have."""
        return isinstance(value, self.types) and not isinstance(value, self.excluded)

    def matches(self, value: Any) -> bool:
        """Return whether the argument may be ``value``."""
        if not self.has_type(value):
            return False
        return value is None or (
            (self.least is None or value >= self.least) and (self.below is None or value < self.below)
        )


NONE = type(None)
FLAG = Expected("True or False", (bool, np.bool_))
FLAG_OR_NONE = Expected("True, False or None", (bool, np.bool_, NONE))
COUNT = Expected("an integer of at least 1", (Integral,), (bool,), least=1)
INDEX = Expected("an integer of at least 0", (Integral,), (bool,), least=0)
SEED = Expected("an integer of at least 0 and below 2**32", (Integral,), (bool,), least=0, below=2**32)
NUMBER = Expected("a number", (Real,), (bool,))
PATH = Expected("a path", (str, PathLike))
MODULE = Expected("a torch Module", (nn.Module,))
OPTIMIZER = Expected("a torch Optimizer", (Optimizer,))
DTYPE = Expected("a torch.dtype, or None", (torch.dtype, NONE))
FUNCTION = Expected("a function, or None", (Callable, NONE))  # type: ignore[arg-type]
LIST = Expected("a list, or None", (Sequence, np.ndarray, torch.Tensor, NONE), (str, bytes))
SIZE = Expected("an integer of at least 1, or None", (Integral, NONE), (bool,), least=1)


def refusal(
    call: str, name: str, value: object, expected: Expected, remedy: str = ""
) -> ArgumentError | ArgumentTypeError:
    """Return the error for ``value`` as the argument ``name`` of ``call``."""
    error = ArgumentError if expected.has_type(value) else ArgumentTypeError
    return error(f"{call}: expected {name} to be {expected.words}, got {shown(value)}{remedy and f'. {remedy}'}")


def device_of(call: str, device: Any) -> torch.device | None:
    """Return ``device``, an argument of ``call``, as a torch.device; None stays None."""
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        expected = Expected("a torch.device or its name, such as 'cpu' or 'cuda:0'", (str, int))
        raise refusal(call, "device", device, expected) from error


def check_processor(call: str, name: str, value: object) -> None:
    """Raise unless ``value``, an argument of ``call``, is None or can be written with ``save_pretrained``."""
    if value is not None and (isinstance(value, type) or not callable(getattr(value, "save_pretrained", None))):
        expected = Expected("an object with save_pretrained, or None", ())
        raise refusal(call, name, value, expected, "Pass the tokenizer or processor itself, not its name or directory")
