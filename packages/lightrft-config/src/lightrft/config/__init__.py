"""Settings and exceptions of LightRFT's strategy layer. Needs pydantic and PyYAML; imports neither torch nor NumPy.

`StrategyConfig` and pydantic are imported when they are used (PEP 562): importing the exceptions costs milliseconds.
"""

from typing import TYPE_CHECKING

from lightrft.config.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendNotInstalledError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    ConfigFileError,
    EngineError,
    LightRFTError,
    StaleWeightsError,
    StrategyError,
    UnsupportedOperationError,
)

if TYPE_CHECKING:
    from lightrft.config.names import nearest
    from lightrft.config.strategy_config import StrategyConfig

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BackendNotInstalledError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "ConfigFileError",
    "EngineError",
    "LightRFTError",
    "StaleWeightsError",
    "StrategyConfig",
    "StrategyError",
    "UnsupportedOperationError",
    "nearest",
]


def __getattr__(name: str) -> object:
    if name == "StrategyConfig":
        from lightrft.config.strategy_config import StrategyConfig

        globals()[name] = StrategyConfig
        return StrategyConfig
    if name == "nearest":
        from lightrft.config.names import nearest

        globals()[name] = nearest
        return nearest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
