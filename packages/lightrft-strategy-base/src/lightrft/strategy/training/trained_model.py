"""One model in training: its gradient accumulation, its updates, its skips. Models share nothing.

A window of micro-batches runs from one update to the next. In it `backward` may be called any number of
times, and `step` once a micro-batch; the last `step` of the window makes the update from the mean, over the
micro-batches and the ranks, of the losses as they were given.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightrft.config import ArgumentError, ArgumentTypeError, StrategyError
from lightrft.strategy.backend import Backend
from lightrft.strategy.training.gradients import leads_to
from lightrft.strategy.training.optimizers import parameters_of


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
        self, backend: Backend, model: nn.Module, kind: type[nn.Module], optimizer: Optimizer, names: Mapping[int, str],
        window: int,
    ) -> None:  # fmt: skip
        """``model`` is unwrapped, and was a ``kind`` before wrapping, which may replace its class; ``names`` are those of
        its parameters by ``id``; ``window`` is K."""
        self.kind = kind.__name__
        self.backend, self.model, self.optimizer, self.window = backend, model, optimizer, window
        self.parameters = [parameter for parameter in parameters_of(optimizer) if parameter.requires_grad]
        """Those that train; what is frozen in ``optimizer`` stays as it is."""
        self.identities = frozenset(map(id, self.parameters))
        self._frozen = [parameter for parameter in parameters_of(optimizer) if not parameter.requires_grad]
        self._names = names
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
        if not leads_to(loss, self.backend._leaves(self), self.backend.transparent):
            raise StrategyError(
                f"backward: the loss does not depend on any trainable parameter of {self.kind}; pass the model that "
                f"computed it"
            )
        self.backend._backward(self, loss if self.window == 1 else loss / self.window, retain_graph)
        self.backwards += 1

    def step(self, scheduler: LRScheduler | None, boundary: bool | None, agree: Callable[[object], None]) -> StepResult:
        """End a micro-batch, and, where it is the window's last, make the update.

        The last is the K-th, or the one with ``boundary`` True. ``agree`` raises on every rank unless all pass
        the same value; a boundary that is counted needs no agreement, since all ranks count alike.
        """
        self._check_scheduler(scheduler)
        if not (boundary is None or isinstance(boundary, bool)):
            raise ArgumentTypeError(f"optimizer_step: boundary={boundary!r}; allowed is True, False or None")
        self.micro_batches += 1
        if boundary is not None:
            agree({"boundary": boundary, "micro-batches": self.micro_batches})
        if not (self.micro_batches >= self.window if boundary is None else boundary):
            return INSIDE_THE_WINDOW
        if not self.backwards:
            self.micro_batches = 0
            raise StrategyError(
                f"optimizer_step: no backward since the last update of this model ({self.kind}); "
                f"call strategy.backward(loss, model, optimizer) for each micro-batch"
            )
        return self._update(scheduler)

    def _update(self, scheduler: LRScheduler | None) -> StepResult:
        self._check_frozen()
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
        elif self.scheduler is not None and self.updates == 1:
            warnings.warn(
                f"optimizer_step: {self.kind} was prepared with a scheduler ({type(self.scheduler).__name__}), which moves "
                f"only where it is passed: optimizer_step(optimizer, model, scheduler)",
                stacklevel=4,
            )
        return StepResult(applied=True, skipped=False, grad_norm=norm)

    def _check_scheduler(self, scheduler: LRScheduler | None) -> None:
        """Raise before anything has moved where ``scheduler`` cannot be stepped with an update of this model."""
        if scheduler is None:
            return
        kind = type(scheduler).__name__
        if not callable(getattr(scheduler, "step", None)):
            raise ArgumentTypeError(f"optimizer_step: the scheduler is {scheduler!r} ({kind}), which has no step()")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ArgumentError(
                f"optimizer_step: {kind} steps by a metric, not by updates; step it yourself, and pass no scheduler"
            )
        if getattr(scheduler, "optimizer", self.optimizer) is not self.optimizer:
            raise StrategyError(
                f"optimizer_step: the scheduler ({kind}) belongs to another optimizer than that of this model ({self.kind})"
            )

    def _check_frozen(self) -> None:
        thawed = [self._names[id(parameter)] for parameter in self._frozen if parameter.requires_grad]
        if thawed:
            raise StrategyError(
                f"optimizer_step: {len(thawed)} parameters of {self.kind} were frozen when it was prepared, and are not "
                f"now ({thawed[0]} first); prepare it with everything trainable that ever trains"
            )

    def _skip(self, norm: float) -> StepResult:
        self.skipped += 1
        self.skipped_in_a_row += 1
        limit = self.backend.config.max_skipped_updates
        if limit and self.skipped_in_a_row >= limit:
            raise StrategyError(
                f"optimizer_step: {self.skipped_in_a_row} updates in a row of {self.kind} had a "
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
