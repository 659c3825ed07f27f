"""One weight, several names: by how a model is wrapped, and by which vintage of transformers wrote its checkpoint.

A vision-language model's text layers have been `model.layers`, `language_model.model.layers` and
`model.language_model.layers` in turn; compiling, checkpointing and sharding wrap modules. All of these have one
canonical name, which nothing else has. Pure functions of names.
"""

import re
from collections.abc import Iterable

from lightrft.config import EngineError

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PREFIXES = re.compile(r"^(?:module\.|model\.|language_model\.)+")


def canonical(name: str) -> str:
    """The name without wrappers and without the prefixes that differ between vintages."""
    return _PREFIXES.sub("", _WRAPPERS.sub("", name))


def sender_names(stored: Iterable[str], sent: Iterable[str]) -> dict[str, str]:
    """For each name in a checkpoint the one under which a sender has the same weight, or itself where it has none.

    Raises `EngineError` where two names on one side mean the same weight.
    """
    by_canonical = _unambiguous(sent)
    _unambiguous(names := list(stored))
    return {name: by_canonical.get(canonical(name), name) for name in names}


def _unambiguous(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(canonical(name), name)
        if other != name:
            raise EngineError(f"the weights {other} and {name} cannot be told apart: both are {canonical(name)}")
    return found
