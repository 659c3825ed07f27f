"""Takes away, one by one, what an adapter uses of its library, and says for what the adapter raised no error.

    python patch_cases.py vllm

Runs in a process of its own: importing an engine changes the process, and the library is altered.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest

from lightrft.config import EngineError
from lightrft.strategy.patching import Target

NEW = "_renamed_upstream"


@contextmanager
def renamed(target: Target) -> Iterator[None]:
    """The library as if ``target`` had another name; for a constructor, which cannot vanish, its class."""
    owner, name = target.owner(), target.name
    if name == "__init__":
        owner, name = sys.modules[target.target.partition(":")[0]], owner.__name__
    with pytest.MonkeyPatch.context() as patch:
        for base in owner.__mro__ if isinstance(owner, type) else [owner]:
            if isinstance(base, type):
                _rename_assignments(patch, base, name)
            if name in vars(base):
                patch.delattr(base, name)
        yield


def _rename_assignments(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """In the methods of ``owner``, call an attribute ``name`` of objects something else."""
    for method in map(inspect.unwrap, filter(callable, vars(owner).values())):
        if isinstance(method, FunctionType) and name in method.__code__.co_names:
            names = tuple(name + NEW if known == name else known for known in method.__code__.co_names)
            patch.setattr(method, "__code__", method.__code__.replace(co_names=names))


def unnoticed(library: Any, targets: tuple[Target, ...]) -> list[str]:
    """The targets without which ``library.load`` raises no `EngineError` that names them."""
    library.load()
    missed = []
    for target in targets:
        with renamed(target):
            try:
                library.load()
            except EngineError as error:
                if target.target.replace(":", ".") in str(error) and "pip install" in str(error):
                    continue
            missed.append(target.target)
    library.load()
    return missed


def main(engine: str) -> None:
    """Print the unnoticed targets of ``engine``, and how many there are in all."""
    package = f"lightrft.engines.{engine}"
    library, *modules = (importlib.import_module(f"{package}.{name}") for name in MODULES[engine])
    targets = tuple(target for module in modules for target in module.TARGETS)
    print(json.dumps({"unnoticed": unnoticed(library, targets), "targets": len(targets)}))


MODULES = {"vllm": ("library", "patches", "torch_patches"), "sglang": ("library", "patches")}

if __name__ == "__main__":
    main(sys.argv[1])
