"""The placeholder for a shared engine that runs on another rank."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NoReturn

import torch

from lightrft.config import EngineError
from lightrft.strategy.compat import LLMEngine
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout.engine import PARTS, Completion, EngineCapabilities, Part, Prompt
from lightrft.strategy.rollout.sampling import Sampling


class EnginePlaceholder:
    """Reports the state of an engine that runs on another rank, and refuses calls: only the strategy may make them."""

    capabilities = EngineCapabilities()

    def __init__(self, max_model_len: int | None) -> None:
        """Create the placeholder of a new engine.

        Args:
            max_model_len: Maximum tokens of a sequence; None: no limit.
        """
        self.max_model_len = max_model_len
        self.awake: frozenset[Part] = PARTS
        self.weight_version = 0

    @property
    def llm_engine(self) -> LLMEngine:
        """What LightRFT's trainers read of vLLM's engine."""
        return LLMEngine.of(self.max_model_len)

    @property
    def expected_weights(self) -> Mapping[str, torch.Size] | None:
        return None

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        self._refuse("generate", "gather_and_generate")

    def update_weights(self, buckets: Iterable[Bucket]) -> None:
        self._refuse("update_weights", "update_engine_weights")

    def invalidate_weights(self, why: str) -> None:
        self._refuse("invalidate_weights", "update_engine_weights")

    def sleep(self, level: int = 1) -> None:
        self._refuse("sleep", "maybe_sleep_inference_engine")

    def wake_up(self, parts: Collection[Part] | None = None) -> None:
        self._refuse("wake_up", "wakeup_inference_engine")

    def shutdown(self) -> None:
        self._refuse("shutdown", "close")

    def _refuse(self, call: str, instead: str) -> NoReturn:
        raise EngineError(
            f"inference_engine.{call}: expected an engine that runs on this rank, got one that runs on another rank. Call "
            f"strategy.{instead} on all ranks"
        )
