"""Finds `lightrft` in this project's packages first, then in a clone of LightRFT.

The clone's ``lightrft/__init__.py`` hides every other package of that name, and a folder put before it on sys.path would not
help when the clone comes first. So a finder handles that one name, wherever the clone is on sys.path, or if it is not on it
at all. The clone's own ``__init__.py`` is not executed. Every Python startup imports this module, so it imports only what
Python has imported by then.
"""

import os
import sys

MYPY = False
if MYPY:
    from importlib.machinery import ModuleSpec


class CloneFinder:
    """Finds the package `lightrft`, and nothing else. If both have a subpackage, ours is found."""

    def __init__(self, clone: str) -> None:
        self.clone = clone

    def find_spec(self, name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        """Return a package that consists of our folders and the clone's.

        Raises:
            ImportError: Another clone is on sys.path.
        """
        if name != "lightrft" or not is_clone(self.clone):
            return None
        from importlib.machinery import ModuleSpec  # not at the start of Python

        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [*self._our_folders(), os.path.join(self.clone, "lightrft")]
        return spec

    def _our_folders(self) -> list[str]:
        roots = [root for root in dict.fromkeys(map(os.path.abspath, sys.path)) if _has_package(root)]
        clones = [root for root in roots if is_clone(root) and os.path.realpath(root) != self.clone]
        if clones:
            raise ImportError(
                f"lightrft: expected the adopted clone of LightRFT, {self.clone}, got another on sys.path: {clones[0]}. "
                f"Run: lightrft adopt --undo; lightrft adopt {clones[0]}"
            )
        return [os.path.join(root, "lightrft") for root in roots if not is_clone(root)]


def is_clone(root: str) -> bool:
    """Return whether ``root`` has LightRFT's trainers, which this project's packages do not."""
    return os.path.isdir(os.path.join(root, "lightrft", "trainer"))


def _has_package(root: str) -> bool:
    return os.path.isdir(os.path.join(root, "lightrft"))


def install(clone: str) -> None:
    """Make this process import `lightrft` from our packages and from ``clone``, an absolute path."""
    sys.meta_path.insert(0, CloneFinder(clone))
