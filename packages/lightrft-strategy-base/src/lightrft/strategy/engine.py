"""What the author of an engine imports: the contract, prompts and completions, sampling, the weight stream.

`EngineBase` keeps the promises that all engines share, over a few hooks. `EmbeddedEngine` fills in those hooks for an
engine that runs a copy of the actor in this process.
"""

from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout.embedded import (
    EmbeddedEngine,
    EmbeddedModel,
    check_decoder_only,
    eos_token_ids_of,
    eos_token_ids_of_model,
    weight_shapes,
)
from lightrft.strategy.rollout.engine import (
    PARTS,
    Completion,
    EngineBase,
    EngineCapabilities,
    EngineRequest,
    Part,
    Prompt,
    RolloutEngine,
    is_engine,
    too_long_message,
)
from lightrft.strategy.rollout.sampling import Sampling, apply_penalties, random_key, sample_tokens, uniform

__all__ = [
    "PARTS",
    "Bucket",
    "Completion",
    "EmbeddedEngine",
    "EmbeddedModel",
    "EngineBase",
    "EngineCapabilities",
    "EngineRequest",
    "Part",
    "Prompt",
    "RolloutEngine",
    "Sampling",
    "apply_penalties",
    "check_decoder_only",
    "eos_token_ids_of",
    "eos_token_ids_of_model",
    "is_engine",
    "random_key",
    "sample_tokens",
    "too_long_message",
    "uniform",
    "weight_shapes",
]
