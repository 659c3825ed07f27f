"""Where strategies, engines and trackers come from: the groups of entry points, and what to install for a name.

The registry of lightrft-strategy-base loads from these groups; the command line lists them without importing torch.
"""

from typing import Final

STRATEGIES: Final = "lightrft.strategies"
"""Group of entry points whose values are strategy classes."""
ENGINES: Final = "lightrft.engines"
"""Group of entry points whose values are engine classes."""
TRACKERS: Final = "lightrft.trackers"
"""Group of entry points whose values are tracker classes."""
PACKAGES: Final = {
    (STRATEGIES, "deepspeed"): "lightrft-deepspeed",
    (STRATEGIES, "fsdp"): "lightrft-fsdp",
    (ENGINES, "transformers"): "lightrft-engines[transformers]",
    (ENGINES, "vllm"): "lightrft-engines[vllm]",
    (ENGINES, "sglang"): "lightrft-engines[sglang]",
    (TRACKERS, "tensorboard"): "lightrft-strategy-base[tensorboard]",
    (TRACKERS, "wandb"): "lightrft-strategy-base[wandb]",
    (TRACKERS, "trackio"): "lightrft-strategy-base[trackio]",
}
"""The requirement to install for a name that is not installed."""
