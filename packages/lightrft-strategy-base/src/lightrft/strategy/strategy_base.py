"""`StrategyBase`: the one API over every training backend and every rollout engine.

A thin face. What it promises is in the docstrings of its public methods, which stand by concern in
`lightrft.strategy.api`; what it does is in its parts: `World` and `Operations` (the process group),
`Collectives`, `Preparation` and `PreparedModels`, `TrainedModel` (one for each model), `MovingAverages`, `Checkpoints`,
`Rollout`. A backend is a subclass that overrides the hooks of `Backend`, and only those.
"""

from lightrft.strategy.api.exporting import Exporting
from lightrft.strategy.api.rollouts import Rollouts


class StrategyBase(Rollouts, Exporting):
    """Trains models and generates from them, on one process or many, by one contract.

    Made ready by its constructor; a context manager, which `close` ends. Every rank makes the same calls in
    the same order, but where a method says otherwise. Raises `ConfigError` for settings, `StrategyError` for
    misuse and for lost peers, `EngineError` for rollouts; each names the call.
    """
