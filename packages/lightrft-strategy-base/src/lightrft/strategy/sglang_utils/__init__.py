"""Alias at LightRFT's path."""

from lightrft.strategy.compat_paths import get_sglang_engine as get_sglang_engine
