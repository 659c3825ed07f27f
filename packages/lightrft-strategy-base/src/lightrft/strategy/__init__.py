"""One typed API over training backends and rollout engines; see `StrategyBase`."""

from lightrft.config import StrategyConfig
from lightrft.strategy.data.micro_batches import MicroBatch
from lightrft.strategy.fake_strategy import FakeStrategy, get_fake_strategy
from lightrft.strategy.log_probs import LogProbs, linear_log_probs
from lightrft.strategy.models.registry import is_actor
from lightrft.strategy.rollout.engine import (
    Completion,
    EngineBase,
    EngineCapabilities,
    EngineRequest,
    Prompt,
    RolloutEngine,
    is_engine,
)
from lightrft.strategy.rollout.rollout import EngineStatus
from lightrft.strategy.rollout.sampling import Sampling
from lightrft.strategy.step.result import StepResult
from lightrft.strategy.strategy import get_strategy
from lightrft.strategy.strategy_base import StrategyBase

__all__ = [
    "Completion",
    "EngineBase",
    "EngineCapabilities",
    "EngineRequest",
    "EngineStatus",
    "FakeStrategy",
    "LogProbs",
    "MicroBatch",
    "Prompt",
    "RolloutEngine",
    "Sampling",
    "StepResult",
    "StrategyBase",
    "StrategyConfig",
    "get_fake_strategy",
    "get_strategy",
    "is_actor",
    "is_engine",
    "linear_log_probs",
]
