"""Alias at LightRFT's path: `FSDPV2Strategy`, of the package lightrft-fsdp."""

from lightrft.strategy.compat_paths import strategy_alias

__getattr__ = strategy_alias("FSDPV2Strategy", "fsdp")
