"""Settings and exceptions of LightRFT's strategy layer. Needs pydantic and PyYAML; imports neither torch nor NumPy."""

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
