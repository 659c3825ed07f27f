"""Alias at LightRFT's path."""

from lightrft.strategy.compat_paths import gather_inputs_object_for_inference as gather_inputs_object_for_inference
