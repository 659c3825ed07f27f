"""Finding strategies, engines and trackers by name, among the entry points of installed packages.

A package registers a strategy under the group ``lightrft.strategies``, an engine under ``lightrft.engines`` and a tracker
under ``lightrft.trackers``; the value is the class. Nothing is imported until it is asked for.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from lightrft.config import BackendNotInstalledError, ConfigError, nearest
from lightrft.config.packages import ENGINES as ENGINES
from lightrft.config.packages import PACKAGES
from lightrft.config.packages import STRATEGIES as STRATEGIES
from lightrft.config.packages import TRACKERS as TRACKERS
from lightrft.config.validation import shown

Base = TypeVar("Base")
_WORDS = {STRATEGIES: "strategy", ENGINES: "engine", TRACKERS: "tracker"}
_imported: dict[tuple[str, str], Any] = {}
"""What the entry points that were asked for name: reading the metadata of all distributions takes milliseconds."""


def registered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of ``group`` by name."""
    return {point.name: point for point in entry_points(group=group)}


def load(group: str, name: str, base: type[Base]) -> type[Base]:
    """Return the class registered in ``group`` as ``name``, or found at ``module:attribute``.

    Raises:
        BackendNotInstalledError: It is not installed, or cannot be imported; with the pip command.
        ConfigError: The name is unknown, or the object is not a subclass of ``base``.
    """
    loaded = _load(group, name)
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise ConfigError(
            f"{_WORDS[group]} {name!r}: expected a subclass of {base.__name__}, got {loaded!r}. Register the class itself"
        )
    return loaded


def _load(group: str, name: str) -> Any:
    word = _WORDS[group]
    if not isinstance(name, str):
        raise ConfigError(f"{word}: expected a registered name or 'module:attribute', got {shown(name)}. Pass a string")
    if (group, name) in _imported:
        return _imported[group, name]
    if ":" in name and all(part.isidentifier() for part in name.replace(":", ".", 1).split(".")):
        return _import(EntryPoint(name=name, value=name, group=group), group)
    points = registered(group)
    if name in points:
        return _imported.setdefault((group, name), _import(points[name], group))
    package = PACKAGES.get((group, name))
    if package is not None:
        raise BackendNotInstalledError(f"{word} {name!r} is not installed; install it with: pip install {package!r}")
    likely = nearest(name, [*points, *(known for known_group, known in PACKAGES if known_group == group)])
    hint = f"did you mean {likely!r}? " if likely else ""
    raise ConfigError(f"there is no {word} {name!r}; {hint}registered names: {', '.join(sorted(points)) or 'none'}")


def _import(point: EntryPoint, group: str) -> Any:
    try:
        return point.load()
    except ImportError as error:
        package = PACKAGES.get((group, point.name))
        remedy = f"pip install {package!r}" if package else "install its package and the dependencies of that package"
        raise BackendNotInstalledError(
            f"{_WORDS[group]} {point.name!r} ({point.value}) cannot be imported: {error}. To repair it: {remedy}"
        ) from error
    except AttributeError as error:
        raise BackendNotInstalledError(
            f"{_WORDS[group]} {point.name!r}: {point.value} does not exist: {error}. Correct the name, or reinstall its package"
        ) from error
