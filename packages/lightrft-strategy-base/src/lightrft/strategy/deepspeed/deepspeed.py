"""Alias at LightRFT's path: `DeepspeedStrategy`, of the package lightrft-deepspeed."""

from lightrft.strategy.compat_paths import strategy_alias

__getattr__ = strategy_alias("DeepspeedStrategy", "deepspeed")
