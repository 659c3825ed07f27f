"""What `optimizer_step` returns."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one `optimizer_step` did."""

    applied: bool
    """Whether the weights were updated."""
    skipped: bool
    """Whether the update was skipped, because the gradient was not finite on some rank, or the denominators add up to 0."""
    grad_norm: float | None
    """Global 2-norm of the gradient before clipping; None between updates, and if the denominators add up to 0; not finite
    if the update was skipped for another reason."""
    denominator: float | None = None
    """Sum of the denominators over the micro-batches and ranks of the update; None between updates, and without them."""
    loss: float | None = None
    """Loss that the update was made from: the mean over micro-batches and ranks or, with denominators, the sum of the losses
    over the sum of the denominators; equal on all ranks. None between updates, and if the denominators add up to 0."""


BETWEEN_UPDATES = StepResult(applied=False, skipped=False, grad_norm=None)
