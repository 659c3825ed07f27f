"""Remove one target from an installed library, for tests of the error that a backend raises."""

from collections.abc import Sequence
from importlib import import_module

import pytest

from lightrft.strategy.patching import Target


def remove(target: Target, targets: Sequence[Target], monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove ``target`` of ``targets``. A class is replaced by one that has only its other targets."""
    owner = target.owner()
    if not isinstance(owner, type):
        monkeypatch.delattr(owner, target.name)
        return
    path = target.target.rpartition(".")[0]
    others = {other.name for other in targets if other.target.rpartition(".")[0] == path} - {target.name}
    stand_in = type(owner.__name__, (), dict.fromkeys(others, lambda *values, **arguments: None))
    monkeypatch.setattr(import_module(path.partition(":")[0]), owner.__name__, stand_in)
