"""One weight, several names: they differ by how a model is wrapped and by the version of transformers that saved it.

The text layers of a vision-language model have been called `model.layers`, `language_model.model.layers` and
`model.language_model.layers`. Compiling, checkpointing and sharding wrap modules. All these names have the same
canonical name, and no other weight has it.
"""

import re
from collections.abc import Iterable

from lightrft.config import EngineError

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PREFIXES = re.compile(r"^(?:module\.|model\.|language_model\.)+")


def canonical(name: str) -> str:
    """The name without wrappers and without the prefixes that differ between versions."""
    return _PREFIXES.sub("", _WRAPPERS.sub("", name))


def sender_names(stored: Iterable[str], sent: Iterable[str]) -> dict[str, str]:
    """Map each name in a checkpoint to the sender's name of the same weight, or to itself if the sender has none.

    Args:
        stored: Names in the engine's checkpoint.
        sent: Names that the sender uses.

    Raises:
        EngineError: Two names on one side have the same canonical name.
    """
    by_canonical = _by_canonical_name(sent)
    _by_canonical_name(names := list(stored))
    return {name: by_canonical.get(canonical(name), name) for name in names}


def _by_canonical_name(names: Iterable[str]) -> dict[str, str]:
    by_canonical: dict[str, str] = {}
    for name in names:
        other = by_canonical.setdefault(canonical(name), name)
        if other != name:
            raise EngineError(
                f"weight sync: expected different names after removing wrappers and prefixes, got {other} and {name}, "
                f"which both become {canonical(name)}. Rename one of the modules"
            )
    return by_canonical
