"""`StrategyConfig` under LightRFT's import path; it is defined in lightrft-config."""

from lightrft.config import StrategyConfig

__all__ = ["StrategyConfig"]
