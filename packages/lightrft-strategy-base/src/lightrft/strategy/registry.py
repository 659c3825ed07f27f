"""Finding strategies and engines by name: the entry points of whatever is installed.

A package registers a strategy under the group ``lightrft.strategies`` and an engine under
``lightrft.engines``; the value is the class. Nothing is imported until it is asked for.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from lightrft.config import BackendNotInstalledError, ConfigError, StrategyConfig, nearest

if TYPE_CHECKING:
    from lightrft.strategy.rollout.engine import EngineBase
    from lightrft.strategy.strategy_base import StrategyBase

STRATEGIES, ENGINES = "lightrft.strategies", "lightrft.engines"
_PACKAGES = {
    (STRATEGIES, "deepspeed"): "lightrft-deepspeed",
    (STRATEGIES, "fsdp"): "lightrft-fsdp",
    (ENGINES, "transformers"): "lightrft-engines[transformers]",
    (ENGINES, "vllm"): "lightrft-engines[vllm]",
    (ENGINES, "sglang"): "lightrft-engines[sglang]",
}
"""What to install for a name that is not: the error is all that this table serves."""


def registered(group: str) -> dict[str, EntryPoint]:
    """The entry points of ``group`` by name."""
    return {point.name: point for point in entry_points(group=group)}


def strategy_name(config: StrategyConfig) -> str:
    """The registered name that the settings mean: "auto" is "fsdp" where ``fsdp`` is set, else "deepspeed"."""
    return config.strategy if config.strategy != "auto" else "fsdp" if config.fsdp else "deepspeed"


def strategy_class(name: str) -> "type[StrategyBase]":
    """The strategy registered as ``name``, or at ``module:attribute``."""
    from lightrft.strategy.strategy_base import StrategyBase

    found = _load(STRATEGIES, name, "strategy")
    if not (isinstance(found, type) and issubclass(found, StrategyBase)):
        raise ConfigError(f"strategy {name!r} is {found!r}, which is no class below StrategyBase")
    return found


def engine_class(name: str) -> "type[EngineBase]":
    """The engine registered as ``name``, or at ``module:attribute``."""
    from lightrft.strategy.rollout.engine import EngineBase

    found = _load(ENGINES, name, "engine")
    if not (isinstance(found, type) and issubclass(found, EngineBase)):
        raise ConfigError(f"engine {name!r} is {found!r}, which is no class below EngineBase")
    return found


def _load(group: str, name: str, what: str) -> Any:
    if not isinstance(name, str):
        raise ConfigError(f"{what} {name!r} is a {type(name).__name__}; wanted a registered name, or module:attribute")
    points = registered(group)
    if name in points:
        return _import(points[name], group, what)
    if all(part.isidentifier() for part in name.replace(":", ".", 1).split(".")) and ":" in name:
        return _import(EntryPoint(name=name, value=name, group=group), group, what)
    package = _PACKAGES.get((group, name))
    if package is not None:
        raise BackendNotInstalledError(f"{what} {name!r} is not installed; install it with: pip install {package!r}")
    likely = nearest(name, [*points, *(known for kind, known in _PACKAGES if kind == group)])
    hint = f"did you mean {likely!r}? " if likely else ""
    raise ConfigError(f"there is no {what} {name!r}; {hint}registered are: {', '.join(sorted(points)) or 'none'}")


def _import(point: EntryPoint, group: str, what: str) -> Any:
    try:
        return point.load()
    except ImportError as error:
        package = _PACKAGES.get((group, point.name))
        remedy = f"; install it with: pip install {package!r}" if package else ""
        raise BackendNotInstalledError(
            f"{what} {point.name!r} ({point.value}) cannot be imported: {error}{remedy}"
        ) from error
    except AttributeError as error:
        raise BackendNotInstalledError(f"{what} {point.name!r}: {point.value} is not there: {error}") from error
