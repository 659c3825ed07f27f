"""Settings and errors of LightRFT's strategy layer. Needs pydantic and PyYAML; loads no torch and no NumPy."""

from lightrft.config.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendNotInstalledError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
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
    "EngineError",
    "LightRFTError",
    "StaleWeightsError",
    "StrategyConfig",
    "StrategyError",
    "UnsupportedOperationError",
    "nearest",
]
