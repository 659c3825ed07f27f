"""LightRFT's place for `StrategyConfig`, which lives in lightrft-config."""

from lightrft.config import StrategyConfig

__all__ = ["StrategyConfig"]
