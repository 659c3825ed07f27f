"""One model in training: its gradient accumulation, its updates, its skips. Models share nothing.

A window of micro-batches runs from one update to the next. In it `backward` may be called any number of
times, and `step` once a micro-batch; the last `step` of the window makes the update from the mean, over the
micro-batches and the ranks, of the losses as they were given.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.config import ArgumentError, StrategyError
from lightrft.strategy.backend import Backend


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one `optimizer_step` did."""

    applied: bool
    """An update was made."""
    skipped: bool
    """The window ended, and no update was made, because the gradient was not finite on some rank."""
    grad_norm: float | None
    """Global 2-norm of the gradient before clipping; None inside the window; not finite where skipped."""


INSIDE_THE_WINDOW = StepResult(applied=False, skipped=False, grad_norm=None)


class TrainedModel:
    """A prepared model with its optimizer, and the counters of its updates."""

    def __init__(
        self, backend: Backend, model: nn.Module, optimizer: Optimizer, names: Mapping[int, str], window: int
    ) -> None:
        """``model`` is unwrapped; ``names`` are those of its parameters by ``id``; ``window`` is K."""
        self.backend, self.model, self.optimizer, self.window = backend, model, optimizer, window
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.group_names = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        self.scheduler: LRScheduler | None = None
        self.micro_batches = 0
        """Calls of `step` since the last update."""
        self.backwards = 0
        """Calls of `backward` since the last update."""
        self.updates = 0
        """Updates applied."""
        self.skipped = 0
        """Updates skipped."""
        self.skipped_in_a_row = 0
        self.optimizer_offloaded = False

    @property
    def has_pending_gradient(self) -> bool:
        """Whether the window has begun, so that a gradient is there and no update yet."""
        return bool(self.micro_batches or self.backwards)

    def backward(self, loss: torch.Tensor, *, retain_graph: bool = False) -> None:
        """Add the gradient of ``loss``, a scalar with a graph, to the window's."""
        check_loss(loss)
        self.backend._backward(self, loss if self.window == 1 else loss / self.window, retain_graph)
        self.backwards += 1

    def step(self, scheduler: LRScheduler | None, boundary: bool | None, agree: Callable[[object], None]) -> StepResult:
        """End a micro-batch, and, where it is the window's last, make the update.

        The last is the K-th, or the one with ``boundary`` True. ``agree`` raises on every rank unless all pass
        the same value; a boundary that is counted needs no agreement, since all ranks count alike.
        """
        self.micro_batches += 1
        if boundary is not None:
            agree([boundary, self.micro_batches])
        if not (self.micro_batches >= self.window if boundary is None else boundary):
            return INSIDE_THE_WINDOW
        if not self.backwards:
            self.micro_batches = 0
            raise StrategyError(
                f"optimizer_step: no backward since the last update of this model ({type(self.model).__name__}); "
                f"call strategy.backward(loss, model, optimizer) for each micro-batch"
            )
        return self._update(scheduler)

    def _update(self, scheduler: LRScheduler | None) -> StepResult:
        # backward divided each loss by K; a window that an explicit boundary ended may have had another length
        factor = self.window / self.micro_batches
        norm = self.backend._update(self, factor)
        self.micro_batches = self.backwards = 0
        if not math.isfinite(norm):
            return self._skip(norm)
        self.updates += 1
        self.skipped_in_a_row = 0
        if scheduler is not None:
            self.scheduler = scheduler
            scheduler.step()
        return StepResult(applied=True, skipped=False, grad_norm=norm)

    def _skip(self, norm: float) -> StepResult:
        self.skipped += 1
        self.skipped_in_a_row += 1
        limit = self.backend.config.max_skipped_updates
        if limit and self.skipped_in_a_row >= limit:
            raise StrategyError(
                f"optimizer_step: {self.skipped_in_a_row} updates in a row of {type(self.model).__name__} had a "
                f"gradient that is not finite (norm {norm}); the weights are those of update {self.updates}. Look at "
                f"the loss and the learning rate; max_skipped_updates={limit} sets how many are borne"
            )
        return StepResult(applied=False, skipped=True, grad_norm=norm)


def check_loss(loss: object) -> None:
    """Raise unless ``loss`` is a scalar tensor with a graph."""
    if not isinstance(loss, torch.Tensor):
        raise ArgumentError(f"backward: the loss is {loss!r} ({type(loss).__name__}); wanted a scalar tensor")
    if loss.numel() != 1 or loss.ndim > 1:
        raise ArgumentError(
            f"backward: the loss has shape {tuple(loss.shape)}; wanted a scalar. Reduce it, with .mean() say"
        )
    if not loss.requires_grad:
        raise StrategyError(
            "backward: the loss carries no graph (requires_grad is False); it was detached, computed under "
            "torch.no_grad, or depends on no trainable parameter"
        )
