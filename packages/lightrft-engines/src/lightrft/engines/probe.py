"""Whether the installed engine has the calls that an adapter will make.

Engines change their calls between minor versions. What an adapter cannot drive it refuses when it is built, not in
the middle of training, and not by training on against stale weights.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightrft.config import BackendNotInstalledError, EngineError


@dataclass(frozen=True, kw_only=True)
class Library:
    """An engine's library: by which distributions it comes, and which versions its adapter was tested with."""

    engine: str
    distributions: tuple[str, ...]
    supported: str
    """In words, such as "0.30 to 0.33"."""
    remark: str = ""
    """On installing it."""

    @property
    def found(self) -> str:
        """Distribution and version that are installed. Raises `BackendNotInstalledError` where there is none."""
        for name in self.distributions:
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                continue
        raise BackendNotInstalledError(
            f"engine {self.engine!r} is not installed: {' or '.join(self.distributions)} was not found; supported are the "
            f"versions {self.supported}; install it, in an environment of its own, with: "
            f"pip install 'lightrft-engines[{self.engine}]'{self.remark}"
        )

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Raise `BackendNotInstalledError` where the body cannot import it, or what it needs."""
        try:
            yield
        except (ImportError, OSError, RuntimeError) as error:
            raise BackendNotInstalledError(
                f"engine {self.engine!r}: {self.found} is installed, and cannot be imported: {type(error).__name__}: {error}. "
                f"It wants an environment of its own; see the README of lightrft-engines"
            ) from error

    def require(self, calls: "Iterable[Call]") -> None:
        """Raise `BackendNotInstalledError` where it is not there, and `EngineError` unless every call can be made."""
        found = self.found
        missing = [lack for call in calls if (lack := call.missing()) is not None]
        if missing:
            raise EngineError(
                f"engine {self.engine!r} cannot drive {found}: {'; '.join(missing)}. Supported are the versions "
                f"{self.supported}"
            )


@dataclass(frozen=True)
class Call:
    """A function or method with the parameters that an adapter passes by name."""

    owner: Callable[..., Any] | Any
    name: str
    parameters: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What is not there, in words, or None where the call can be made."""
        label = f"{getattr(self.owner, '__name__', self.owner)}.{self.name}"
        function = getattr(self.owner, self.name, None)
        if function is None:
            return f"there is no {label}"
        accepted = inspect.signature(function).parameters
        if any(it.kind is inspect.Parameter.VAR_KEYWORD for it in accepted.values()):
            return None
        lacking = [name for name in self.parameters if name not in accepted]
        return f"{label} takes no {', '.join(lacking)}" if lacking else None
