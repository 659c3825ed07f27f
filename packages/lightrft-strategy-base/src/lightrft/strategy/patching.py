"""Patches of other libraries: each is described, checked before it is applied, and can be undone.

A package keeps its patches of one library in one `patches.py`. It calls `require` when it is built, so that a renamed
target is an error there, not a patch that does nothing.
"""

import dis
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from lightrft.config import LightRFTError, StrategyError


@dataclass(frozen=True, kw_only=True)
class Target:
    """An attribute of another library that our code uses or replaces."""

    target: str
    """Module and attribute: "package.module:name" or "package.module:Class.name"."""
    parameters: tuple[str, ...] = ()
    """Parameters of a function that our code passes or reads by name."""

    @property
    def name(self) -> str:
        """The attribute's name without its owner."""
        return self.target.replace(":", ".").rpartition(".")[2]

    def owner(self) -> Any:
        """The module or class that has the attribute. Imports the module."""
        module, _, path = self.target.partition(":")
        return functools.reduce(getattr, path.split(".")[:-1], importlib.import_module(module))

    def missing(self, instance: object | None = None) -> str | None:
        """Describe what is missing in the installed library, or return None. ``instance``: check it instead of the class."""
        label = self.target.replace(":", ".")
        try:
            owner = self.owner() if instance is None else instance
        except (ImportError, AttributeError) as error:
            return f"{label} does not exist: {error}"
        if not hasattr(owner, self.name):
            return None if _assigned_by_method(owner, self.name) else f"{label} does not exist"
        accepted = inspect.signature(getattr(owner, self.name)).parameters if self.parameters else {}
        kinds = {parameter.kind for parameter in accepted.values()}
        if kinds >= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:  # a wrapper, which passes all on
            return None
        lacking = [name for name in self.parameters if name not in accepted]
        return f"{label} has no parameter {', '.join(lacking)}" if lacking else None


@dataclass(frozen=True, kw_only=True)
class Patch(Target):
    """A replacement of an attribute of another library."""

    replacement: Callable[[Any], Any]
    """Makes the new value from the original; see `around` for functions."""
    why: str
    upstream: str
    """URL of the upstream issue or of the source line."""
    versions: str
    """Versions of the library that need the patch."""
    until: str
    """When the patch can be removed."""

    def apply(self, instance: object | None = None) -> Callable[[], None]:
        """Replace the attribute, on the module or class, or on one ``instance``.

        Returns: A function that restores the original.
        Raises: `StrategyError` if the attribute does not exist.
        """
        lacking = self.missing(instance)
        if lacking is not None:
            raise StrategyError(
                f"cannot patch {self.target.replace(':', '.')}: {lacking}. Install a version that the patch supports: "
                f"{self.versions}"
            )
        owner: Any = self.owner() if instance is None else instance
        stored = vars(owner).get(self.name, _INHERITED)
        original = inspect.getattr_static(owner, self.name) if isinstance(owner, type) else getattr(owner, self.name)
        if isinstance(original, (classmethod, staticmethod)):
            setattr(owner, self.name, type(original)(self.replacement(original.__func__)))
        else:
            setattr(owner, self.name, self.replacement(original))
        return lambda: delattr(owner, self.name) if stored is _INHERITED else setattr(owner, self.name, stored)


_INHERITED = object()


def around(hook: Callable[..., Any]) -> Callable[[Any], Any]:
    """A replacement for a function that calls ``hook(original, *args, **kwargs)`` in its place."""

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: object, **kwargs: object) -> Any:
            return hook(original, *args, **kwargs)

        return call

    return replacement


def require(
    user: str, library: str, supported: str, targets: Iterable[Target], error: type[LightRFTError] = StrategyError
) -> None:
    """Check that the installed library has all ``targets``.

    Args:
        user: The component that needs them, for the message, such as "engine 'vllm'".
        library: The name of the installed distribution.
        supported: The versions that work, as pip takes them, such as ">=0.30,<0.33".
        targets: What must exist. Their modules are imported.
        error: The class to raise.

    Raises: ``error``, with the library, its version, what is missing and the remedy.
    """
    lacking = [lack for target in targets if (lack := target.missing()) is not None]
    if lacking:
        raise error(
            f"{user} expected {library}{supported}, got {library} {version(library)}, where {'; '.join(lacking)}. "
            f"Install a supported version: pip install --force-reinstall '{library}{supported}'; if {version(library)} is in "
            f"this range, use an earlier version of it"
        )


def _assigned_by_method(owner: object, name: str) -> bool:
    """Whether a method of the class ``owner`` assigns the attribute ``name`` of an object."""
    methods = [value for base in getattr(owner, "__mro__", ()) for value in vars(base).values() if callable(value)]
    return any(
        step.opname == "STORE_ATTR" and step.argval == name
        for method in map(inspect.unwrap, methods)
        if inspect.isfunction(method)
        for step in dis.get_instructions(method)
    )
