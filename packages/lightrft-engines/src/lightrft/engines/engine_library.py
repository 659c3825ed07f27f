"""Checks that the installed engine has everything that its adapter uses.

Engines change their calls between minor versions. An adapter fails when it is built if something is missing, not in
the middle of training, and generation never continues with stale weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from lightrft.config import BackendNotInstalledError, EngineError
from lightrft.strategy.patching import Target, require


@dataclass(frozen=True, kw_only=True)
class EngineLibrary:
    """The library of an engine, and the versions that its adapter supports."""

    engine: str
    distributions: tuple[str, ...]
    """Names under which the library is published; the first that is installed counts."""
    supported: str
    """A version specifier, such as ">=0.30,<0.33"."""
    install_hint: str = ""
    """Added to the message that says how to install it."""

    @property
    def distribution(self) -> str:
        """The distribution that is installed. Raises `BackendNotInstalledError` if there is none."""
        for name in self.distributions:
            try:
                version(name)
            except PackageNotFoundError:
                continue
            return name
        raise BackendNotInstalledError(
            f"engine {self.engine!r} expected {' or '.join(self.distributions)} {self.supported}, got none: it is not "
            f"installed. Install it in a separate environment: pip install 'lightrft-engines[{self.engine}]'"
            f"{self.install_hint}"
        )

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Raise `BackendNotInstalledError` if the body fails to import the library or one of its dependencies."""
        try:
            yield
        except (ImportError, OSError, RuntimeError) as error:
            name = self.distribution
            raise BackendNotInstalledError(
                f"engine {self.engine!r} cannot import {name} {version(name)}: {type(error).__name__}: {error}. Install "
                f"it in a separate environment; see the README of lightrft-engines"
            ) from error

    def require(self, targets: Iterable[Target] = ()) -> None:
        """Check that the library is installed and has all ``targets``.

        Raises:
            BackendNotInstalledError: It is not installed.
            EngineError: A target is missing. The message names the version, what is missing and the remedy.
        """
        require(f"engine {self.engine!r}", self.distribution, self.supported, targets, EngineError)
