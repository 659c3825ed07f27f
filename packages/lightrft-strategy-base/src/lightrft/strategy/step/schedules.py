"""The learning-rate schedule that LightRFT's trainers use, and the schedulers that an update can step."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightrft.config import ArgumentError, ArgumentTypeError, StrategyError
from lightrft.config.validation import shown
from lightrft.strategy.backend.types import TrainedModel

MIN_RATE = 0.1
"""Learning rate at the end of the cosine, as a fraction of the peak."""


def warmup_then_cosine(warmup: int, total: int, floor: float = MIN_RATE) -> Callable[[int], float]:
    """Return a linear warmup followed by a cosine decay: transformers' "cosine_with_min_lr".

    Args:
        warmup: Updates of the warmup, from 0 to the peak.
        total: Updates of warmup and cosine together; the rate stays at ``floor`` afterwards.
        floor: Learning rate at the end, as a fraction of the peak.

    Returns:
        A function from the number of updates so far to a fraction of the peak.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def cosine_schedule(optimizer: Optimizer, warmup_ratio: float, max_steps: int) -> LambdaLR:
    """Return `warmup_then_cosine` as a scheduler of ``optimizer``.

    Args:
        optimizer: Its learning rates are the peaks.
        warmup_ratio: Fraction of ``max_steps`` that is warmup.
        max_steps: Updates until the cosine ends.
    """
    return LambdaLR(optimizer, warmup_then_cosine(math.ceil(max_steps * warmup_ratio), max_steps))


def check_scheduler(trained: TrainedModel, scheduler: LRScheduler) -> None:
    """Raise, before anything changes, if ``scheduler`` cannot be stepped with an update of ``trained``."""
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)):
        raise ArgumentTypeError(f"optimizer_step: expected a scheduler with step(), got {shown(scheduler)}")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ArgumentError(
            f"optimizer_step: expected a scheduler that steps by updates, got {name}, which steps by a metric. Step it "
            f"yourself, and pass no scheduler"
        )
    if getattr(scheduler, "optimizer", trained.optimizer) is not trained.optimizer:
        raise StrategyError(
            f"optimizer_step: expected the scheduler of this model's optimizer ({trained.class_name}), got a {name} of "
            f"another optimizer. Pass the scheduler that was created for this optimizer"
        )
