"""Alias at LightRFT's path."""

from lightrft.strategy.compat_paths import _SeqAllToAll as _SeqAllToAll
from lightrft.strategy.compat_paths import get_sequence_parallel_group as get_sequence_parallel_group
from lightrft.strategy.compat_paths import get_sequence_parallel_world_size as get_sequence_parallel_world_size
