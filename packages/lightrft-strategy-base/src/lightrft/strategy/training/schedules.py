"""The learning-rate schedule that LightRFT's trainers use."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

MIN_RATE = 0.1
"""Where the cosine ends, as a part of the peak."""


def warmup_then_cosine(warmup: int, total: int, floor: float = MIN_RATE) -> Callable[[int], float]:
    """The factor of the peak at update ``step``: linear from 0 over ``warmup``, then a cosine down to ``floor``.

    transformers' "cosine_with_min_lr".
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def cosine_schedule(optimizer: Optimizer, warmup_ratio: float, max_steps: int) -> LambdaLR:
    """That schedule over ``max_steps`` updates, the first ``warmup_ratio`` of them warming up."""
    return LambdaLR(optimizer, warmup_then_cosine(math.ceil(max_steps * warmup_ratio), max_steps))
